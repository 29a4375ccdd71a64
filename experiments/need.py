"""
The picture of RESULTS.md, "When are thoughts used?", from the table there: steering (by how many
points an exchanged thought turns the answers to what it predicts) over what training without
thoughts reaches, and over the gain.

    python -m experiments.need          writes experiments/assets/need.png
"""
from pathlib import Path

from experiments.curves import plt

HEADER = '| run | right | no_thoughts | pause | gain | steering |'
KINDS = {'puzzle': ('o', 'tab:blue'), 'after pause': ('D', 'tab:green'),
         'rotated': ('s', 'tab:orange'), 'SmolLM2': ('^', 'tab:red')}

here = Path(__file__).parent
_, _, table = (here / 'RESULTS.md').read_text('utf-8').partition(HEADER)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout='constrained')
for line in table.partition('\n\n')[0].splitlines()[2:]:
    cells = [cell.strip() for cell in line.strip('| ').split('|')]
    run, right, *controls, gain, steering = cells
    marker, colour = KINDS[run.partition(',')[0]]
    marker = marker if float(right) >= 83 else 'x'      # not learnt
    best = max([float(accuracy) for accuracy in controls if accuracy != '-'], default='-')
    for steered in steering.split(', '):        # a thought each
        ink = 'none' if '(' in steered else colour
        for axis, x in zip(axes, (best, gain)):
            if x != '-':
                axis.plot(float(x), float(steered.strip('()')), marker, markeredgecolor=colour,
                          markerfacecolor=ink, alpha=0.7)
for kind, (marker, colour) in KINDS.items():
    axes[0].plot([], [], marker, color=colour, label=kind)
axes[0].plot([], [], 'o', color='black', markerfacecolor='none', label='hollow: of the last room')
axes[0].plot([], [], 'kx', label='the task is not learnt')
axes[0].legend(fontsize=8, loc='center left', bbox_to_anchor=(0.32, 0.4))
axes[0].set(xlabel='the better control is right, %', ylabel='steering, points', xlim=(20, 102))
axes[1].set(xlabel='gain: loss of pause / loss with thoughts', xscale='log')
axes[1].axvline(1, color='grey', lw=0.8)
for axis in axes:
    axis.axhspan(50, 102, color='grey', alpha=0.12)     # used
    axis.axhspan(-2, 5, color='grey', alpha=0.12)       # not used
figure.savefig(here / 'assets' / 'need.png', dpi=120)
