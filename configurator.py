"""
Config files and flags over a script's defaults, which stay plain assignments:

    batch_size = 32      # a knob: a lower-case name, a bool, int, float or str
    knobs = configure(globals())

Files first, then flags, wherever they stand. The default's type is the knob's. A config file may
also set knobs of the other scripts, so that one recipe serves all; anything else ends the script.
"""
import difflib
import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path

from model import Config

HERE = Path(__file__).resolve().parent
SCRIPTS = ('prepare', 'train', 'sample', 'experiments/probe')
TEXTS = ('prompt', 'answer', 'question')  # knobs in which a flag's \n is the end of a line
PLAIN = (bool, int, float, str)
# of a model: knobs of train.py too, which count only where a file or flag sets them
FIELDS = {field.name: field.default for field in fields(Config) if type(field.default) in PLAIN}


def knob_names(script):
    """The lower-case names that a file assigns before it calls configure."""
    above = Path(script).read_text('utf-8').partition('configure(globals()')[0]
    return re.findall('^([a-z][a-z0-9_]*) = ', above, re.M)


def kind_of(defaults, key, where):
    if key in defaults:
        return type(defaults[key])
    near = difflib.get_close_matches(key, defaults, 1) or ['--help']
    sys.exit(f'{where}: there is no knob {key} here, see {near[0]}')


def parse(defaults, argv, elsewhere=()):
    """Knob -> default, arguments, others' knobs: of those set, knob -> value and knob -> where."""
    values, sources, files, flags, rest = {}, {}, [], [], iter(argv)
    for arg in rest:
        if not arg.startswith('--'):
            files.append(arg)
            continue
        key, given, text = arg[2:].partition('=')
        text = text if given else next(rest, '--')
        if not given and text.startswith('--'):
            sys.exit(f'{arg} has no value: write --{key}=VALUE')
        flags.append((key.replace('-', '_'), text))
    for file in files:
        if not Path(file).is_file():
            sys.exit(f'no config file {file}')
        for key, value in runpy.run_path(file).items():
            of_others = key in elsewhere and key not in defaults
            if key.startswith('_') or isinstance(value, type(sys)) or of_others:
                continue
            kind = kind_of(defaults, key, file)
            value = float(value) if kind is float and type(value) is int else value
            if type(value) is not kind:
                sys.exit(f'{file}: {key} = {value!r}, expected {kind.__name__}')
            values[key], sources[key] = value, file
    for key, text in flags:
        kind = kind_of(defaults, key, f'--{key}')
        if key in TEXTS:
            text = text.replace('\\n', '\n')
        try:
            values[key] = {'True': True, 'False': False}[text] if kind is bool else kind(text)
        except (ValueError, KeyError):
            sys.exit(f'--{key}={text}: expected {kind.__name__}')
        sources[key] = 'flag'
    return values, sources


def configure(module, fields={}):
    """Sets a script's globals() and gives its knobs, and those of `fields` that were set."""
    names = knob_names(module['__file__'])
    knobs = {name: module[name] for name in names if type(module.get(name)) in PLAIN}
    elsewhere = {*FIELDS, *(name for one in SCRIPTS for name in knob_names(HERE / f'{one}.py'))}
    given = [arg for arg in sys.argv[1:] if arg != '--help']
    values, sources = parse({**fields, **knobs}, given, elsewhere)
    if given != sys.argv[1:]:
        print(module['__doc__'], *(f'{k} = {v!r}' for k, v in (knobs | fields).items()), sep='\n')
        sys.exit()
    knobs.update(values)
    for key, value in knobs.items():
        print(f'{key:>24} = {value!r}' + (f'   <- {sources[key]}' if key in sources else ''))
    module.update(knobs)
    return knobs
