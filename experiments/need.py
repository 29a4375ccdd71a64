"""
The picture of RESULTS.md, "When are thoughts used?", from the table there: steering (by how many
points an exchanged thought turns the answers to what it predicts) over what training without
thoughts reaches, and over the gain.

    python -m experiments.need          writes experiments/assets/need.png
"""
from pathlib import Path

from experiments.curves import plt

HEADER = '| run | right | no_thoughts | pause | gain | steering |'
KINDS = {'puzzle': ('o', 'tab:blue', 'puzzle'),
         'rotated': ('s', 'tab:orange', 'puzzle, thoughts rotated'),
         'SmolLM2': ('^', 'tab:red', 'SmolLM2-135M')}

here = Path(__file__).parent
_, _, table = (here / 'RESULTS.md').read_text('utf-8').partition(HEADER)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout='constrained')
for line in table.partition('\n\n')[0].splitlines()[2:]:
    run, _, *controls, gain, steering = [cell.strip(' *') for cell in line.strip('| ').split('|')]
    marker, colour, label = KINDS[run.split()[0].strip(',')]
    best = max(float(accuracy) for accuracy in controls if accuracy.strip() != '-')
    for steered in steering.split(','):  # a thought each
        for axis, x in zip(axes, (best, gain)):
            if x != '-':
                axis.plot(float(x), float(steered), marker, color=colour, label=label, alpha=0.6)
axes[0].set(xlabel='the better control is right, %', ylabel='steering, points', ylim=(-5, 105))
axes[1].set(xlabel='gain: loss of pause / loss with thoughts', xscale='log')
axes[1].axvline(1, color='grey', lw=0.8)
for axis in axes:
    axis.axhspan(50, 105, color='grey', alpha=0.12)  # used
    axis.axhline(5, color='grey', lw=0.8)            # not used is below
labels = dict(zip(*axes[0].get_legend_handles_labels()[::-1]))  # each once
axes[0].legend(labels.values(), labels.keys(), fontsize=8, loc='center left')
figure.savefig(here / 'assets' / 'need.png', dpi=120)
