"""
Tests of what the evidence rests on: that maps are what images show, that a predicted answer is the
one another way of following the map gives, and that changed runs are cut off from what they claim
to be cut off from.
"""
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import probe, toy
from test_model import make_batch, script, tiny_model, without_labels


def map_shown(png):
    """Room -> room, read from the pixels of a drawn image alone."""
    pixels = np.array(Image.open(io.BytesIO(png)).convert('RGB'))
    names = {rgb: name for name, rgb in toy.COLOURS.items()}
    shown = {}
    for top in range(0, 84, toy.CELL):
        for left in range(0, 84, toy.CELL):
            outer = tuple(pixels[top + 4, left + 4].tolist())
            inner = tuple(pixels[top + 14, left + 14].tolist())
            if outer in names:
                shown[names[outer]] = names[inner]
    return shown


@pytest.mark.parametrize('hops', (4, 6))
def test_a_rows_edges_are_what_its_image_shows(hops):
    for row in toy.draw(dict(test=20), 3, hops)['test']:
        assert map_shown(row['image']) == dict(row['edges'])


def test_a_predicted_answer_is_where_the_image_leads():
    """The donor is the nearest row below that is elsewhere and ends elsewhere; from its room the
    row's own image, read from its pixels, is followed for the doors that are left."""
    rows = toy.draw(dict(test=60), 5)['test']
    for step in (1, 2, 3, 4):
        donors, predicted = probe.patches(rows, step)
        for i, (row, donor, end) in enumerate(zip(rows, donors.tolist(), predicted)):
            shown = map_shown(row['image'])
            for j in range(i + 1, i + len(rows)):
                room = rows[j % len(rows)]['results'][step - 1]
                last = room
                for _ in range(toy.HOPS - step):
                    last = shown[last]
                if room != row['results'][step - 1] and last != row['results'][-1]:
                    break
            assert (donor, end) == (j % len(rows), last)


def test_the_control_of_a_patch_is_at_the_same_place():
    """Another row's thought at the row's own room: nothing but that room is in common, and the own
    answer is predicted."""
    rows = toy.draw(dict(test=60), 5)['test']
    for step in (1, 4):
        donors, predicted = probe.patches(rows, step, same=True)
        for i, (row, donor, end) in enumerate(zip(rows, donors.tolist(), predicted)):
            below = [(i + j) % len(rows) for j in range(1, len(rows))]
            room = row['results'][step - 1]
            assert donor == next(j for j in below if rows[j]['results'][step - 1] == room)
            assert end == row['results'][-1]


def test_the_control_is_named():
    assert probe.expand('same,patch_2', 2) == ['same_1', 'same_2', 'patch_2']
    with pytest.raises(ValueError, match='same_3, same'):
        probe.expand('same_')


def test_another_image_comes_with_its_map():
    rows = toy.draw(dict(test=5), 5)['test']
    rows = [dict(row, image_size=[84, 84], image_hash='') for row in rows]
    for row, other, asked in zip(rows, rows[1:] + rows[:1], probe.with_other_images(rows)):
        assert asked['question'] == row['question']
        assert dict(asked['edges']) == map_shown(asked['image']) == dict(other['edges'])


def test_where_a_chain_was_left():
    """Shares are of all rows, also where a row has no such step."""
    rows = [dict(results=['red', 'blue', 'pink']), dict(results=['black', 'white'])]
    answers = [dict(text='steps\nblue C'), dict(text='black A')]
    assert probe.arrivals(answers, rows) == [0.5, 0.5, 0]
    assert probe.arrivals([dict(text='pink A'), dict(text='green B')], rows) == [0, 0, 0.5]


def images_changed(batch, rows):
    """The batch with other pixels for these rows, one tile a row."""
    other = dict(batch, pixel_values=batch['pixel_values'].clone())
    other['pixel_values'][rows] = 255 - other['pixel_values'][rows]
    return other


def kept_thoughts(model, batch):
    """float32 [B, n, D]: a batch's thoughts when left alone, by the change that records."""
    with torch.no_grad():
        n = model(**batch).thoughts.shape[1]
        thoughts = torch.zeros(len(batch['input_ids']), n, model.config.hidden_size)
        model(**batch, edit_thought=probe.record(thoughts)(list(range(len(thoughts)))))
    return thoughts


def test_transplanted_thoughts_are_the_rows_own_under_another_image():
    """Another image gives other thoughts; transplanted, the own ones are fed back to the last bit,
    and what stands before them still sees the other image."""
    model = tiny_model()
    batch = without_labels(make_batch(model.config, [1, 1], [(2,), (2,)]))
    own = kept_thoughts(model, batch)
    other = images_changed(batch, [0, 1])
    edit = probe.replace('transplant', own, torch.arange(2))([0, 1])
    with torch.no_grad():
        left_alone, changed = model(**other), model(**other, edit_thought=edit)
    assert (left_alone.thoughts - own).abs().amax() > 1e-3
    assert torch.equal(changed.thoughts, own)


def test_swapped_thoughts_leave_a_row_with_its_own_image():
    """All thoughts are the donor's to the last bit, and the answer still sees the own image."""
    model = tiny_model()
    batch = without_labels(make_batch(model.config, [1, 1], [(2,), (2,)]))
    own = kept_thoughts(model, batch)
    edit = probe.replace('swap', own)([0, 1])
    with torch.no_grad():
        changed = model(**batch, edit_thought=edit)
        again = model(**images_changed(batch, [0]), edit_thought=edit)
    assert torch.equal(changed.thoughts, own.roll(1, 0))
    end = int(batch['attention_mask'][0].sum()) - 1
    assert (changed.logits[0, end] - again.logits[0, end]).abs().amax() > 1e-4
    assert torch.allclose(changed.logits[1], again.logits[1], atol=1e-5)


def test_a_blind_answer_has_the_thoughts_and_no_image():
    """Where no text has seen the image, since it stands right before the thoughts, own thoughts
    under another image give the same answer if blind, and another if not. In one layer: in the
    upper layers the thoughts' own places look at the image themselves."""
    model = tiny_model(num_hidden_layers=1)
    batch = without_labels(make_batch(model.config, [1], [(2,)]))
    ids = batch['input_ids'][0]
    is_image, is_thought = ids == model.config.image_token_id, ids == model.config.latent_token_id
    before = torch.arange(len(ids)) < is_thought.nonzero()[0]
    text_first = [ids[before & ~is_image], ids[is_image], ids[~before]]
    batch['input_ids'] = torch.cat(text_first)[None]
    edit = probe.replace('transplant', kept_thoughts(model, batch), torch.arange(1))([0])
    other = images_changed(batch, [0])
    written = slice(int(is_thought.nonzero()[-1]) + 1, None)
    with torch.no_grad():
        seen = [model(**one, edit_thought=edit).logits[0, written] for one in (batch, other)]
        with probe.hidden_image(model):
            blind = [model(**one, edit_thought=edit).logits[0, written] for one in (batch, other)]
    assert (seen[0] - seen[1]).abs().amax() > 1e-3
    assert torch.equal(blind[0], blind[1])


def test_of_pause_tokens_the_places_are_read_and_what_they_are_fed_is_exchanged(tmp_path):
    """Every row is fed the same pause, so that another row's changes no answer, also where weights
    are large and any change of a thought would; what the places hold differs from row to row."""
    knobs = ['config/toy.py', f'--data_dir={tmp_path}/data']
    script('prepare.py', *knobs, '--train_rows=16', '--val_rows=17', '--test_rows=17')
    script('train.py', *knobs, f'--out_dir={tmp_path}/out', '--mode=pause', '--batch_size=16',
           '--max_latent_stage=1', '--epochs_stage0=1', '--epochs_per_stage=1', '--num_workers=0')
    saved = torch.load(tmp_path / 'out' / 'best.pt', weights_only=True)
    for name, weight in saved['model'].items():
        if weight.dim() == 2 and 'layers' in name:
            weight *= 3
    torch.save(saved, tmp_path / 'loud.pt')
    script('experiments/probe.py', f'--ckpt={tmp_path}/loud.pt', '--intervene=swap,zero')
    records = json.loads((tmp_path / 'probe_test.json').read_text())
    found = {one['name']: one for one in records}
    assert found['swap']['only_clean'] == found['swap']['only_changed'] == 0
    assert found['swap']['tokens_per_answer'] == found['clean']['tokens_per_answer']
    assert found['zero']['tokens_per_answer'] != found['clean']['tokens_per_answer']
    for thought in json.loads((tmp_path / 'thoughts_test.json').read_text()):
        assert thought['cosine_rows'] < 0.999
