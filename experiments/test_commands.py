"""
Tests of the commands around a run: configurator.py, prepare.py and experiments/export.py.
"""
import json
import runpy
import sys
from pathlib import Path

import pytest
import transformers
from PIL import Image

import configurator
import prepare
from model import load_checkpoint, load_tokenizer
from test_model import HERE, TOKENIZER, assert_same, batch_of, obvious, one_row, save, save_trained


def command(monkeypatch, script, *args):
    """Runs a script in this process, which saves the imports."""
    monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
    runpy.run_path(str(HERE / script), run_name='__main__')


# --- prepare.py -----------------------------------------------------------------------------------
def own_rows(folder):
    Image.new('RGB', (40, 30)).save(folder / 'a.png')
    row = dict(question='What is it?', answer='a cat', steps=['It has fur.'], image_path='a.png')
    (folder / 'mine.json').write_text(json.dumps([row] * 2))
    return folder / 'mine.json'


def test_nothing_stays_of_an_earlier_data_set(tmp_path, monkeypatch):
    """A test split that stayed would be reported as the new one's."""
    path, out = own_rows(tmp_path), tmp_path / 'out'
    flags = ['--init_from=scratch', '--image_size=28', f'--data_dir={out}', f'--train_file={path}',
             f'--val_file={path}']
    command(monkeypatch, 'prepare.py', *flags, f'--test_file={path}')
    assert len(prepare.read_split(str(out), 'test')) == 2
    command(monkeypatch, 'prepare.py', *flags)
    assert len(prepare.read_split(str(out), 'validation')) == 2
    assert not (out / 'test.jsonl').exists()
    assert len(load_tokenizer(str(out / 'tokenizer'))) > 256
    assert not [*out.rglob('*.part')]


# --- configurator.py ------------------------------------------------------------------------------
@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Knobs of a script of two, and fields, with these flags and this config file."""
    script, config = tmp_path / 'script.py', tmp_path / 'config.py'
    script.write_text("rate = 0.5\nprompt = ''\nconfigure(globals())\nlate = 1")

    def run(*flags, file=''):
        config.write_text(file)
        monkeypatch.setattr(sys, 'argv', ['script.py', *flags, str(config)])
        module = dict(__file__=str(script), __doc__='What it does.', rate=0.5, prompt='')
        knobs = configurator.configure(module, dict(hidden_size=896, tie_word_embeddings=False))
        assert {key: module[key] for key in knobs} == knobs
        return knobs
    return run


def test_files_come_first_then_flags_each_in_its_defaults_type(configure):
    file = 'import os\n_hidden = 1\nrate = 1\nprompt = "?"\nbatch_size = 7  # of another script'
    assert configure(file=file) == dict(rate=1.0, prompt='?')
    assert configure(r'--prompt=1=2\n', '--rate', '-2', file=file) == dict(rate=-2, prompt='1=2\n')


def test_fields_of_the_model_count_only_where_they_are_set(configure):
    knobs = configure('--tie-word-embeddings=True')
    assert knobs == dict(rate=0.5, prompt='', tie_word_embeddings=True)


@pytest.mark.parametrize('flags, file', (
    (['--rat=1'], ''), (['--rate=x'], ''), (['--tie_word_embeddings=yes'], ''), (['none.py'], ''),
    (['--prompt', '--rate=1'], ''), (['--batch_size=1'], ''), (['--late=1'], ''), ([], 'rat = 1'),
    ([], "rate = '1'"), ([], 'hidden_size = True')))
def test_what_is_no_knob_or_no_value_ends_the_script_in_a_sentence(configure, flags, file):
    with pytest.raises(SystemExit) as end:
        configure(*flags, file=file)
    assert isinstance(end.value.code, str) and '\n' not in end.value.code


def test_help_shows_what_a_script_does_and_its_knobs(configure, capsys):
    with pytest.raises(SystemExit):
        configure('--help')
    said = capsys.readouterr().out
    assert 'What it does.' in said and 'rate = 0.5' in said and 'hidden_size = 896' in said


# --- experiments/export.py -----------------------------------------------------------------------
@pytest.mark.parametrize('kind', ('opengvlab qwen2', 'hf qwen3', 'llama'))
def test_an_export_is_read_by_transformers_and_by_us(tmp_path, monkeypatch, kind):
    save(tmp_path / 'in', kind)
    model, _, _ = load_checkpoint(str(tmp_path / 'in'), thought='scaled')
    save_trained(tmp_path / 'a.pt', model)
    command(monkeypatch, 'experiments/export.py', f'--ckpt={tmp_path}/a.pt',
            f'--folder={tmp_path}/out')
    auto = transformers.AutoModelForCausalLM
    auto = transformers.AutoModelForImageTextToText if ' ' in kind else auto
    row = one_row(batch_of(['ppIIppp'], tile='I' if ' ' in kind else 'p'), 0)
    assert_same(obvious(auto.from_pretrained(tmp_path / 'out'), *row)[0], model(*row).logits[0])
    again, read, _ = load_checkpoint(str(tmp_path / 'out'))
    assert again.config == model.config
    assert_same(again(*row).logits, model(*row).logits, 1e-6)
    assert read.encode('a<|latent|>b') == TOKENIZER.encode('a<|latent|>b')


