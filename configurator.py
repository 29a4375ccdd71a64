"""
Config files and flags over a script's defaults. A script keeps plain assignments and updates its globals once:

    batch_size = 32      # a knob: a public name assigned at the top of a script, a bool, int, float or str
    ...
    globals().update(configure(globals()))

    python train.py config/toy.py --seed=1 --mode pause

Files first, then flags, wherever they stand on the line. The default's type is the knob's type. A config file may also set the
knobs of the scripts beside this one, so that one recipe serves prepare.py, train.py and sample.py; anything else is an error.
"""
import ast
import difflib
import os
import re
import runpy
import sys
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))


def knob_names(script):
    """Public names assigned at the top level of a script, in order."""
    with open(script, encoding='utf-8') as f:
        tree = ast.parse(f.read())
    targets = [node.targets[0] for node in tree.body if isinstance(node, ast.Assign)]
    return [t.id for t in targets if isinstance(t, ast.Name) and re.fullmatch('[a-z][a-z0-9_]*', t.id)]


def parse(defaults, argv, elsewhere=()):
    """(knob -> default, arguments, names of other scripts' knobs) -> (knob -> value, knob -> where it was set). Pure."""
    values, sources, files, flags = dict(defaults), {}, [], []
    while argv:
        arg, *argv = argv
        if not arg.startswith('--'):
            files.append(arg)
            continue
        key, given, text = arg[2:].partition('=')
        key = key.replace('-', '_')
        if not given:
            if not argv or re.match(r'-(?![\d.])', argv[0]):
                raise ValueError(f'{arg} has no value: write --{key}=VALUE')
            text, *argv = argv
        flags.append((key, text))
    for file in files:
        if not os.path.isfile(file):
            raise ValueError(f'no config file {file}: give a path like config/toy.py, or a flag as --key=value')
        try:
            settings = runpy.run_path(file)
        except Exception as error:  # whatever the user's file raises is the user's to read
            raise ValueError(f'{file} does not run: {type(error).__name__}: {error}') from None
        for key, value in settings.items():
            if key.startswith('_') or isinstance(value, type(os)) or (key not in defaults and key in elsewhere):
                continue
            default = lookup(defaults, key, file, elsewhere)
            value = float(value) if type(default) is float and type(value) is int else value
            if type(value) is not type(default):
                raise ValueError(f'{file}: {key} = {value!r} is {type(value).__name__}, expected {type(default).__name__}')
            values[key], sources[key] = value, file
    for key, text in flags:
        kind = type(lookup(defaults, key, f'--{key}', elsewhere))
        try:
            values[key] = {'True': True, 'False': False}[text] if kind is bool else kind(text)
        except (ValueError, KeyError):
            form = 'True or False' if kind is bool else kind.__name__
            raise ValueError(f'--{key}={text}: expected {form}, as in --{key}={defaults[key]}') from None
        sources[key] = 'flag'
    return values, sources


def lookup(defaults, key, where, elsewhere):
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, 1)
        hint = f'did you mean {near[0]}?' if near else 'it belongs to another script' if key in elsewhere else 'see --help'
        raise ValueError(f'{where}: unknown knob {key}, {hint}')
    return defaults[key]


def configure(module):
    """A script's globals() -> its knobs as set by config files and flags. Prints the table; ends the script on bad input."""
    sys.excepthook = one_sentence
    argv = sys.argv[1:]
    scripts = [os.path.join(HERE, name) for name in ('prepare.py', 'train.py', 'sample.py', 'bench.py')]
    elsewhere = {name for script in scripts for name in knob_names(script)}
    defaults = {k: module[k] for k in knob_names(module['__file__']) if isinstance(module.get(k), (bool, int, float, str))}
    helping = {'-h', '--help'} & set(argv)
    values, sources = parse(defaults, [a for a in argv if a not in helping], elsewhere)
    if helping:
        print((module.get('__doc__') or '').strip() + '\n')
    for key, value in values.items():
        print(f'{key:>24} = {value!r}' + (f'   <- {sources[key]}' if key in sources else ''))
    if helping:
        raise SystemExit(0)
    return values


def one_sentence(kind, error, trace):
    """For sys.excepthook: what our own code raises on purpose is one sentence; anything else keeps its traceback."""
    script, raised_in = os.path.basename(sys.argv[0]), traceback.extract_tb(trace)[-1].filename if trace else ''
    if kind is KeyboardInterrupt:
        print(f'\n{script}: stopped by Ctrl-C; what was saved is whole', file=sys.stderr)
        os._exit(130)  # not past the data workers, which would each add a traceback
    if issubclass(kind, (ValueError, OSError)) and os.path.dirname(os.path.abspath(raised_in)) == HERE:
        print(f'{script}: {error}', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
