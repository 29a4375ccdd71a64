"""
Config files and flags over a script's defaults. A script keeps plain assignments and updates its globals once:

    batch_size = 32      # a knob: a public name assigned at the top of a script, a bool, int, float or str
    globals().update(configure(globals()))

    python train.py config/toy.py --seed=1 --mode pause

Files first, then flags, wherever they stand. The default's type is the knob's. A config file may also set knobs of the
scripts beside this one, so that one recipe serves all; anything else is an error.
"""
import ast
import difflib
import multiprocessing
import os
import re
import runpy
import sys
import traceback

TEXTS = ('prompt', 'answer', 'question')  # knobs in which a flag's \\n is the end of a line
SCRIPTS = ('prepare', 'train', 'sample', 'experiments/bench', 'experiments/probe')
HERE = os.path.dirname(os.path.abspath(__file__))


def knob_names(script):
    """Public names assigned at the top level of a script, in order."""
    with open(script, encoding='utf-8') as f:
        tree = ast.parse(f.read())
    names = [getattr(node.targets[0], 'id', '') for node in tree.body if isinstance(node, ast.Assign)]
    return [name for name in names if re.fullmatch('[a-z][a-z0-9_]*', name)]


def parse(defaults, argv, elsewhere=()):
    """(knob -> default, arguments, other scripts' knobs) -> (knob -> value, knob -> where it was set). Pure."""
    values, sources, files, flags, rest = dict(defaults), {}, [], [], iter(argv)
    for arg in rest:
        if not arg.startswith('--'):
            files.append(arg)
            continue
        key, given, text = arg[2:].partition('=')
        key = key.replace('-', '_')
        text = text if given else next(rest, '--')
        if not given and re.match(r'-(?![\d.])', text):
            raise ValueError(f'{arg} has no value: write --{key}=VALUE')
        flags.append((key, text))
    for file in files:
        if not (file.endswith('.py') and os.path.isfile(file)):
            raise ValueError(f'no config file {file}: give a path like config/toy.py, or a flag as --key=value')
        try:
            settings = runpy.run_path(file)
        except Exception as error:  # whatever the user's file raises is the user's to read
            raise ValueError(f'{file} does not run: {type(error).__name__}: {error}') from None
        for key, value in settings.items():
            if key.startswith('_') or isinstance(value, type(os)) or key in elsewhere and key not in defaults:
                continue
            kind = type(lookup(defaults, key, file, elsewhere))
            value = float(value) if kind is float and type(value) is int else value
            if type(value) is not kind:
                raise ValueError(f'{file}: {key} = {value!r} is {type(value).__name__}, expected {kind.__name__}')
            values[key], sources[key] = value, file
    for key, text in flags:
        kind = type(lookup(defaults, key, f'--{key}', elsewhere))
        if key in TEXTS:
            text = text.replace('\\n', '\n')
        try:
            values[key] = {'True': True, 'False': False}[text] if kind is bool else kind(text)
        except (ValueError, KeyError):
            form = 'True or False' if kind is bool else kind.__name__
            raise ValueError(f'--{key}={text}: expected {form}, as in --{key}={defaults[key]}') from None
        sources[key] = 'flag'
    return values, sources


def lookup(defaults, key, where, others):
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, 1)
        hint = f'did you mean {near[0]}?' if near else 'it belongs to another script' if key in others else 'see --help'
        raise ValueError(f'{where}: unknown knob {key}, {hint}')
    return defaults[key]


def configure(module):
    """A script's globals() -> its knobs as files and flags set them. Prints the table; bad input ends the script."""
    sys.excepthook = one_sentence
    scripts = [os.path.join(HERE, f'{name}.py') for name in SCRIPTS]
    elsewhere = {name for script in scripts for name in knob_names(script)}
    known = {name: module.get(name) for name in knob_names(module['__file__'])}
    defaults = {name: value for name, value in known.items() if isinstance(value, (bool, int, float, str))}
    given = [arg for arg in sys.argv[1:] if arg not in ('-h', '--help')]
    values, sources = parse(defaults, given, elsewhere)
    table = '\n'.join(f'{k:>24} = {v!r}' + (f'   <- {sources[k]}' if k in sources else '') for k, v in values.items())
    if given != sys.argv[1:]:
        print(f'{module["__doc__"].strip()}\n\n{table}')
        raise SystemExit(0)
    print(table)
    return values


def one_sentence(kind, error, trace):
    """
    For sys.excepthook: what our own code raises for the user, in a line that begins with raise, is one sentence; any
    other error keeps its traceback, also one in code that was changed here.
    """
    script = os.path.basename(sys.argv[0])
    if kind is KeyboardInterrupt:
        print(f'\n{script}: stopped by Ctrl-C; what was saved is whole', file=sys.stderr)
        os._exit(130)  # not past the data workers, which would each add a traceback
    for worker in multiprocessing.active_children():  # data workers ignore signals, and Python would wait for them
        worker.kill()
    last = traceback.extract_tb(trace)[-1:]
    folders = (HERE, os.path.join(HERE, 'experiments'))
    ours = [frame for frame in last if os.path.dirname(os.path.abspath(frame.filename)) in folders]
    meant = bool(ours) and (ours[0].line or '').strip().startswith('raise ')
    if issubclass(kind, (ValueError, OSError)) and meant:
        print(f'{script}: {error}', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
