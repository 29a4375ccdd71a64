"""
Config files and flags over a script's defaults. A script keeps plain assignments and updates its
globals once:

    batch_size = 32      # a knob: a public name at the top of a script, a bool, int, float or str
    globals().update(configure(globals()))

    python train.py config/toy.py --seed=1 --mode pause

Files first, then flags, wherever they stand. The default's type is the knob's. A config file may
also set knobs of the other scripts, so that one recipe serves all; anything else is an error.
"""
import ast
import difflib
import multiprocessing
import os
import re
import runpy
import sys
import traceback

HERE = os.path.dirname(os.path.realpath(__file__))
SCRIPTS = ('prepare', 'train', 'sample', 'experiments/bench', 'experiments/probe')
TEXTS = ('prompt', 'answer', 'question')  # knobs in which a flag's \n is the end of a line


def knob_names(script):
    """Public names assigned at the top level of a script, in order."""
    with open(script, encoding='utf-8') as f:
        assigned = [node for node in ast.parse(f.read()).body if isinstance(node, ast.Assign)]
    names = [getattr(node.targets[0], 'id', '') for node in assigned]
    return [name for name in names if re.fullmatch('[a-z][a-z0-9_]*', name)]


def parse(defaults, argv, elsewhere=()):
    """(knob -> default, arguments, others' knobs) -> (knob -> value, knob -> where set). Pure."""
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
            raise ValueError(f'no config file {file}: give a path like config/toy.py, or a flag as '
                             '--key=value')
        try:
            settings = runpy.run_path(file)
        except Exception as error:  # whatever the user's file raises is the user's to read
            raise ValueError(f'{file} does not run: {type(error).__name__}: {error}') from None
        for key, value in settings.items():
            of_others = key in elsewhere and key not in defaults
            if key.startswith('_') or isinstance(value, type(os)) or of_others:
                continue
            kind = kind_of(defaults, key, file, elsewhere)
            value = float(value) if kind is float and type(value) is int else value
            if type(value) is not kind:
                raise ValueError(f'{file}: {key} = {value!r} is {type(value).__name__}, expected '
                                 f'{kind.__name__}')
            values[key], sources[key] = value, file
    for key, text in flags:
        kind = kind_of(defaults, key, f'--{key}', elsewhere)
        if key in TEXTS:
            text = text.replace('\\n', '\n')
        try:
            values[key] = {'True': True, 'False': False}[text] if kind is bool else kind(text)
        except (ValueError, KeyError):
            form = 'True or False' if kind is bool else kind.__name__
            raise ValueError(f'--{key}={text}: expected {form}, as in --{key}={defaults[key]}'
                             ) from None
        sources[key] = 'flag'
    return values, sources


def kind_of(defaults, key, where, elsewhere):
    """A knob's type. ValueError where it is not one of this script's."""
    if key in defaults:
        return type(defaults[key])
    near = difflib.get_close_matches(key, defaults, 1)
    hint = 'it belongs to another script' if key in elsewhere else 'see --help'
    raise ValueError(f'{where}: unknown knob {key}, {f"did you mean {near[0]}?" if near else hint}')


def configure(module):
    """A script's globals() -> its knobs as files and flags set them. Prints the table."""
    sys.excepthook = one_sentence
    for stream in (sys.stdout, sys.stderr):  # what the terminal cannot show is shown escaped
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    elsewhere = {name for script in SCRIPTS for name in knob_names(f'{HERE}/{script}.py')}
    known = {name: module.get(name) for name in knob_names(module['__file__'])}
    plain = (bool, int, float, str)
    defaults = {name: value for name, value in known.items() if isinstance(value, plain)}
    given = [arg for arg in sys.argv[1:] if arg not in ('-h', '--help')]
    values, sources = parse(defaults, given, elsewhere)
    lines = [f'{key:>24} = {value!r}' + (f'   <- {sources[key]}' if key in sources else '')
             for key, value in values.items()]
    if given != sys.argv[1:]:
        print('\n'.join([module['__doc__'].strip(), '', *lines]))
        raise SystemExit(0)
    print('\n'.join(lines))
    return values


def one_sentence(kind, error, trace):
    """For sys.excepthook: what our own code raises for the user, in a line that begins with raise,
    is one sentence; any other error keeps its traceback, also one in code that was changed here."""
    script = os.path.basename(sys.argv[0])
    if kind is KeyboardInterrupt:
        print(f'\n{script}: stopped by Ctrl-C; what was saved is whole', file=sys.stderr)
        os._exit(130)  # not past the data workers, which would each add a traceback
    for worker in multiprocessing.active_children():  # they ignore signals: Python would wait
        worker.kill()
    last = traceback.extract_tb(trace)[-1]
    folder = os.path.dirname(os.path.realpath(last.filename))
    ours = folder in (HERE, os.path.join(HERE, 'experiments'))
    meant = ours and (last.line or '').strip().startswith('raise ')
    if issubclass(kind, (ValueError, OSError)) and meant:
        print(f'{script}: {error}', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
