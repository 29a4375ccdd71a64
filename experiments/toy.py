"""
The data sets that are drawn, not downloaded; prepare.py calls them.

"Colour chain", in A-OKVQA's schema. A 3x3 grid of 28-pixel cells: eight rooms and a blank. A room's
outer square is its colour, the inner square is the colour of the room its door leads to. "Four
doors from red?" starts in the red room and follows four doors. Its steps are three colours and a
sentence: "blue", "green", "pink", "black is where the last door leads".

    the start's path is simple:  red -> blue -> green -> pink -> black       (the answer is black)
    any other room, and the last on the path, leads to a random other room

The map must not be invertible. On a permutation, four steps forward can be had as two backward, and
the curriculum alone learns that: accuracy looks perfect while the thoughts carry nothing. Each room
is a visual token of its own, so the image holds the map and nothing else; the answer needs four
look-ups in sequence.

Why not four sentences: thoughts keep the rhythm of the words. A colour is looked up two tokens
after the one before, at the line's end, and so are thoughts 1, 3, 5 and 7 with two thoughts a step.
Where sentences stand between look-ups, every stage has to learn that anew.

"Colour chain in words", text only, for pretrained decoders: "red leads to blue. ... Four doors from
red?" with the same kind of map; its steps are the facts that are used.

"ProsQA-like graphs", text in Coconut's format, after the construction of ProsQA in its appendix
(arXiv 2412.06769, Algorithm 1): "Tom is a wumpus. Every wumpus is a lompus. ... Is Tom a lompus or
a rempus?" Of two kinds one can be reached from Tom, and the steps are the edges of a shortest way
there. The other is as far from another person. With the furthest kind of either side instead, the
one whose parent is not a person is right in 87 % of the graphs of 9 nodes, and a trained model that
scored 89 % had learnt little but that.
"""
import functools
import io
import math
import operator

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from model import END_LATENT, IMG_CONTEXT, LATENT, SPECIAL_TOKENS, START_LATENT
from model import Config, MultiCoCo

COLOURS = {
    'red': (220, 40, 40), 'green': (40, 160, 60), 'blue': (50, 80, 220), 'yellow': (235, 215, 60),
    'pink': (245, 150, 190), 'brown': (125, 80, 45), 'black': (25, 25, 25),
    'white': (245, 245, 245),
}
CELL, NUMBERS = 28, ('No', 'One', 'Two', 'Three', 'Four', 'Five', 'Six')


def draw_map(rng, hops):
    """(order, leads_to), int64 [rooms] each: the rooms in a random order, the first hops + 1 being
    the start's path, and for every room the one that its door leads to."""
    rooms = range(len(COLOURS))
    order = rng.permutation(len(COLOURS))
    path = order[:hops + 1]
    leads_to = np.array([rng.choice([r for r in rooms if r != room]) for room in rooms])
    leads_to[path[:-1]] = path[1:]
    return order, leads_to


def draw_chain(rng, i, hops):
    """Row i in A-OKVQA's schema; its image, uint8 [84, 84, 3], as PNG."""
    names, rooms = list(COLOURS), np.array(list(COLOURS.values()))
    order, leads_to = draw_map(rng, hops)
    path = order[:hops + 1]
    cells = np.full((9, CELL, CELL, 3), 128)
    for cell, room in zip(rng.permutation(9), range(len(names))):
        cells[cell, 2:-2, 2:-2] = rooms[room]
        cells[cell, 7:-7, 7:-7] = rooms[leads_to[room]]
    image = cells.reshape(3, 3, CELL, CELL, 3).swapaxes(1, 2).reshape(3 * CELL, 3 * CELL, 3)
    png = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(png, 'PNG')
    others = rng.permutation([r for r in order if r not in (path[0], path[-1])])
    options = rng.permutation([path[-1], *others[:3]]).tolist()
    right = names[path[-1]]
    return dict(
        question=f'{NUMBERS[hops]} doors from {names[path[0]]}?',
        choices=[names[r] for r in options], correct_choice_idx=options.index(path[-1]),
        direct_answers=str([right]), difficult_direct_answer=False,
        rationales=[*(names[r] for r in path[1:-1]), f'{right} is where the last door leads'],
        results=[names[r] for r in path[1:]],
        edges=[[names[a], names[b]] for a, b in enumerate(leads_to)],
        image=dict(bytes=png.getvalue()), question_id=f'{i:05d}')


def draw_chain_in_words(rng, hops):
    """One text-only row in Coconut's format: the map is eight facts, a step the one that is used
    next."""
    names = list(COLOURS)
    order, leads_to = draw_map(rng, hops)
    path = order[:hops + 1]
    facts = [f'{names[a]} leads to {names[b]}.' for a, b in enumerate(leads_to)]
    question = f'{NUMBERS[hops]} doors from {names[path[0]]}?'
    results = [names[r] for r in path[1:]]
    return dict(question='\n'.join([*rng.permutation(facts), question]),
                steps=[facts[r] for r in path[:-1]], answer=results[-1], results=results,
                edges=[[names[a], names[b]] for a, b in enumerate(leads_to)])


PEOPLE = 'Alex Tom Jack Sally Davis Bob Max Fae Stella Carol Wren Polly Rex Sam Oliver'.split()
STEPS = 3  # the ways asked about have at least 1, 2, ... STEPS steps, in turn
STARTS = 'wu ya zu du ro nu tu vu jo sho yu go le lo bri gri ste fo re ti scro bo hi gwo fi'
KINDS = [f'{start}mpus' for start in STARTS.split()]
# the published ProsQA's names, sizes, and share of questions of 3, 4, 5 and 6 steps
PUBLISHED_PEOPLE = [*PEOPLE, 'Gabriel', 'Eva']
PUBLISHED_STARTS = ('scrom ster quim wum tum yim vum boom fom stor shum rem bom hil ker ror jel '
                    'yer ter jom zum lem lor gor grim ger rom brim im fel wor chor num zhor gwom '
                    'dum yum tim')
PUBLISHED_KINDS = [f'{start}pus' for start in PUBLISHED_STARTS.split()]
PUBLISHED_STEPS = {3: 0.40, 4: 0.44, 5: 0.14, 6: 0.02}


def draw_graph(rng, nodes, steps, further=0.25, later=1.5, people=PEOPLE, kinds=KINDS):
    """One row in Coconut's format, and under `results` the kind that each step arrives at. One fact
    a line, so that a name is the same token in facts and steps. Nodes 0 and 1 are people; a node
    without a parent is a person too. The next nodes lead `steps` away from each of the two in turn,
    with Poisson(further) further parents; each later node has Poisson(later) parents, deep ones
    more likely. 35 % of these may not descend from 1, 35 % not from 0. The two kinds of the
    question are equally far from 0 and from 1."""
    while True:
        parents, depth = [[], []], [0, 0]
        family = [1, 2]  # 1 descends from node 0, 2 from node 1, 3 from both, 0 from neither
        for node in range(2, nodes):
            on_way = node < 2 + 2 * steps
            shut = 2 - node % 2 if on_way else rng.choice((2, 1, 0), p=(0.35, 0.35, 0.3))
            open_to = [n for n in range(node)
                       if not family[n] & shut and not (on_way and n == node - 2)]
            weight = np.array([1 + 1.5 * depth[n] for n in open_to])
            count = min(len(open_to), rng.poisson(further if on_way else later))
            chosen = []
            if count:
                chosen = rng.choice(open_to, count, replace=False, p=weight / weight.sum()).tolist()
            parents.append([node - 2, *chosen] if on_way else chosen)
            family.append(functools.reduce(operator.or_, (family[n] for n in parents[-1]), 0))
            depth.append(1 + max((depth[n] for n in parents[-1]), default=-1))
        ways = [shortest_ways(parents, start) for start in (0, 1)]
        far = [{len(ways[start][n]): n for n in range(2, nodes) if family[n] == 1 + start}
               for start in (0, 1)]  # one node of each distance
        both = far[0].keys() & far[1].keys()
        if both and max(both) > steps and parents.count([]) <= len(people):
            # else the two ways are too short, or there are too many people: draw another graph
            break
    right, wrong = (far[start][max(both)] for start in (0, 1))
    people, kinds = rng.permutation(people).tolist(), rng.permutation(kinds[:nodes]).tolist()
    name = [kinds.pop() if above else people.pop() for above in parents]
    says = lambda a, b: f'{"Every " if parents[a] else ""}{name[a]} is a {name[b]}.'
    facts = [says(a, b) for b in range(nodes) for a in parents[b]]
    one, other = rng.permutation([right, wrong])
    way = ways[0][right]
    question = f'Is {name[0]} a {name[one]} or a {name[other]}?'
    return dict(question='\n'.join([*rng.permutation(facts), question]),
                steps=[says(a, b) for a, b in zip(way, way[1:])],
                answer=f'{name[0]} is a {name[right]}.', results=[name[n] for n in way[1:]],
                edges=[[name[a], name[b]] for b in range(nodes) for a in parents[b]])


def shortest_ways(parents, start):
    """Node -> a shortest way from `start` to it, for all that descend from it; parents come before
    their children."""
    ways = {start: [start]}
    for node, above in enumerate(parents):
        if reached := [ways[n] for n in above if n in ways]:
            ways[node] = [*min(reached, key=len), node]
    return ways


def draw_small_graph(rng, i, nodes):
    """A graph of a random size up to `nodes`. From large graphs alone a small model does not learn
    to look a fact up; from small ones among them it does."""
    steps = 1 + i % STEPS
    return draw_graph(rng, int(rng.integers(2 + 2 * steps, nodes + 1)), steps)


def draw_published_graph(rng):
    """A graph of the published ProsQA's size and form: 23 nodes and 36 edges in the mean, 3 to 6
    steps, its names, a question's facts in one line. What it does not have is that file's shortcut:
    the two kinds asked about are equally far from their two people."""
    steps = int(rng.choice(list(PUBLISHED_STEPS), p=list(PUBLISHED_STEPS.values())))
    nodes = int(np.clip(round(rng.normal(24, 2)), 2 + 2 * steps, 28))
    kinds = rng.permutation(PUBLISHED_KINDS)
    row = draw_graph(rng, nodes, steps, 0.5, 1.85, PUBLISHED_PEOPLE, kinds)
    row['question'] = row['question'].replace('\n', ' ').replace(' or a ', ' or ')
    return row


DRAWN = dict(toy=lambda rng, i, hops, nodes: draw_chain(rng, i, hops),
             words=lambda rng, i, hops, nodes: draw_chain_in_words(rng, hops),
             prosqa=lambda rng, i, hops, nodes: draw_small_graph(rng, i, nodes),
             prosqa_full=lambda rng, i, hops, nodes: draw_published_graph(rng))


def draw(dataset, counts, seed, hops, nodes):
    """split -> rows of a data set of DRAWN for `counts`, split -> number. Every split has its own
    random stream."""
    assert 1 <= hops < len(NUMBERS) and 2 + 2 * STEPS <= nodes <= len(KINDS), (hops, nodes)
    rngs = [np.random.default_rng((seed, number)) for number in range(len(counts))]
    return {split: [DRAWN[dataset](rng, i, hops, nodes) for i in range(count)]
            for rng, (split, count) in zip(rngs, counts.items())}


def train_tokenizer(texts, folder, vocab_size=512):  # 256 bytes, special tokens, some merges
    """A byte-level BPE tokenizer with InternVL's and Coconut's special tokens, in transformers'
    format."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>', *SPECIAL_TOKENS]))
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token='<|im_end|>', pad_token='<|endoftext|>')
    wrapped.save_pretrained(folder)


@torch.no_grad()
def new_model(tokenizer, **shape):
    """A model from scratch; shape: fields of Config. Embeddings and the final norm have scale 0.35,
    so that a thought has the scale of an embedding; where the head is tied to embeddings of width
    64, as in config/toy.py, logits start near scale 1 (0.35 * 0.35 * sqrt(64))."""
    ids_of = tokenizer.convert_tokens_to_ids
    c = Config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
               image_token_id=ids_of(IMG_CONTEXT), latent_token_id=ids_of(LATENT),
               eos_token_ids=(tokenizer.eos_token_id,), **shape)
    model = MultiCoCo(c)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            std = module.weight[0].numel() ** -0.5
            if name.endswith(('o_proj', 'down_proj', 'attn.proj', 'fc2')):
                # the ends of the residual branches
                vision = name.startswith('vision_model')
                std /= math.sqrt(2 * (c.vision_num_layers if vision else c.num_hidden_layers))
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embeddings = model.language_model.model.embed_tokens.weight
    nn.init.normal_(embeddings, std=0.35)
    model.language_model.model.norm.weight.fill_(0.35)
    if c.vision_num_layers:
        nn.init.normal_(model.vision_model.cls_token, std=0.35)
        nn.init.normal_(model.vision_model.pos_embed, std=0.35)
    # both markers of thoughts start as copies of the line end, which stage 0 trains: a marker ends
    # the question as a line end ends a step
    line_end = embeddings[tokenizer.encode('\n', add_special_tokens=False)[-1]].clone()
    embeddings[ids_of([START_LATENT, END_LATENT])] = line_end
    return model
