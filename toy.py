"""
The data set that is drawn, not downloaded: "colour chain", in A-OKVQA's schema, called by prepare.py.

A 3x3 grid of 28-pixel cells: eight rooms and a blank. A room's outer square is its colour, the inner square is the colour of the
room its door leads to. "Four doors from red?" starts in the red room and follows four doors. Its
steps are three colours and a sentence: "blue", "green", "pink", "black is where the last door leads".

    the start's path is simple:  red -> blue -> green -> pink -> black       (the answer is black)
    any other room, and the last on the path, leads to a random other room

The map must not be invertible. On a permutation, four steps forward can be had as two backward, and the curriculum alone learns
that: accuracy looks perfect while the thoughts carry nothing. Each room is a visual token of its own, so the image holds the map
and nothing else; the answer needs four look-ups in sequence.

Why not four sentences: thoughts keep the rhythm of the words. A colour is looked up two tokens after the one before, at the line's end,
and so are thoughts 1, 3, 5 and 7 with two thoughts a step. Where sentences stand between look-ups, every stage has to learn that anew.
"""
import io
import os

import numpy as np
from PIL import Image

COLOURS = {'red': (220, 40, 40), 'green': (40, 160, 60), 'blue': (50, 80, 220), 'yellow': (235, 215, 60),
           'pink': (245, 150, 190), 'brown': (125, 80, 45), 'black': (25, 25, 25), 'white': (245, 245, 245)}
CELL, HOPS, NUMBERS = 28, 4, ('No', 'One', 'Two', 'Three', 'Four', 'Five', 'Six')


def draw_chain(rng, hops=HOPS):
    """One row: (image uint8 [84, 84, 3], fields of A-OKVQA's schema without image and question_id)."""
    names, rooms = list(COLOURS), np.array(list(COLOURS.values()))
    order = rng.permutation(len(names))
    path = order[:hops + 1]
    leads_to = np.array([rng.choice([r for r in range(len(names)) if r != room]) for room in range(len(names))])
    leads_to[path[:-1]] = path[1:]
    cells = np.full((9, CELL, CELL, 3), 128)
    for cell, room in zip(rng.permutation(9), range(len(names))):
        cells[cell, 2:-2, 2:-2] = rooms[room]
        cells[cell, 7:-7, 7:-7] = rooms[leads_to[room]]
    image = cells.reshape(3, 3, CELL, CELL, 3).swapaxes(1, 2).reshape(3 * CELL, 3 * CELL, 3)
    options = rng.permutation([path[-1], *rng.permutation([r for r in order if r not in (path[0], path[-1])])[:3]])
    return image.astype(np.uint8), dict(question=f'{NUMBERS[hops]} doors from {names[path[0]]}?', choices=[names[r] for r in options],
                       correct_choice_idx=int(list(options).index(path[-1])), direct_answers=str([names[path[-1]]]),
                       difficult_direct_answer=False, rationales=[*(names[r] for r in path[1:-1]), f'{names[path[-1]]} is where the last door leads'])


def draw(folder, rows, seed):
    """Writes `rows` (split -> number) as {folder}/{split}.parquet, images as PNG. Every split has its own random stream."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature
    features = Features(image=ImageFeature(), question_id=Value('string'), question=Value('string'), choices=List(Value('string')),
                        correct_choice_idx=Value('int8'), direct_answers=Value('string'), difficult_direct_answer=Value('bool'),
                        rationales=List(Value('string')))
    os.makedirs(folder, exist_ok=True)
    for number, (split, count) in enumerate(rows.items()):
        rng, drawn = np.random.default_rng((seed, number)), []
        for i in range(count):
            image, fields = draw_chain(rng)
            png = io.BytesIO()
            Image.fromarray(image).save(png, 'PNG')
            drawn.append(dict(fields, image=dict(bytes=png.getvalue(), path=None), question_id=f'{i:05d}'))
        path = os.path.join(folder, f'{split}.parquet')
        Dataset.from_list(drawn, features=features).to_parquet(path + '.part')
        os.replace(path + '.part', path)
