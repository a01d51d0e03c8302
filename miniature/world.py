"""The miniature's world: small critters in eight places, four lights and four outfits.

A critter has an IDENTITY, which mostly only a picture can tell (colours, pattern, eyes; its shape
and ears are also named by the prompt). It appears in a CONTEXT, which the prompt tells (scene,
accessory, light), and in one of six POSES, which the prompt tells as well; around each pose there
is a small free jitter. Everything is drawn from signed distance functions in torch, a whole batch
at once: no file, no download.

The held-out rule: identity `i` is held out of every training set when `(i * 2654435761 mod 2**32)
// 2**16 % 10 == 0` (Knuth's multiplicative hash; its upper half, for the lower bits are those of
`i`). See `is_held_out`."""

import math

import torch
import torch.nn.functional as F

# ---- what a critter can be -----------------------------------------------------------------------
COLOURS = {  # any two are told apart at a glance, in every light: at least 0.38 apart in RGB
    "red": (0.86, 0.10, 0.14),
    "orange": (1.00, 0.50, 0.00),
    "yellow": (1.00, 0.92, 0.15),
    "green": (0.15, 0.62, 0.20),
    "teal": (0.10, 0.80, 0.78),
    "blue": (0.12, 0.25, 0.88),
    "purple": (0.52, 0.16, 0.70),
    "pink": (1.00, 0.50, 0.80),
    "white": (0.97, 0.97, 0.97),
    "brown": (0.42, 0.24, 0.12),
}
IDENTITY = {  # attribute -> its values; their order is the order of the columns everywhere
    "shape": ["round", "square", "tall", "pear-shaped", "triangular", "ghostly"],
    "ears": ["earless", "cat-eared", "bunny-eared", "horned", "antennaed"],
    "colour": list(COLOURS),
    "second": list(COLOURS),  # of ears, feet and pattern; never equal to the main colour
    "pattern": ["plain", "belly", "trousers", "hood", "side"],  # the area of the second colour
    "eyes": ["one", "two", "three"],
}
SCENES = {  # the prompt's words -> colours of the sky and of the ground
    "in the snow": ([0.72, 0.84, 0.95], [0.97, 0.98, 1.0]),
    "on the beach": ([0.55, 0.80, 0.98], [0.94, 0.84, 0.56]),
    "in the forest": ([0.16, 0.34, 0.20], [0.26, 0.42, 0.16]),
    "in a cave": ([0.20, 0.16, 0.16], [0.36, 0.29, 0.27]),
    "in the desert": ([0.98, 0.78, 0.48], [0.86, 0.62, 0.30]),
    "in the city": ([0.62, 0.68, 0.76], [0.34, 0.35, 0.38]),
    "in the meadow": ([0.50, 0.78, 1.0], [0.42, 0.74, 0.26]),
    "in space": ([0.05, 0.04, 0.14], [0.42, 0.34, 0.52]),
}
LIGHTS = {  # the prompt's words -> the light's colour, and where it stands (x, y down)
    "at noon": ([1.0, 1.0, 1.0], [0.0, -1.0]),
    "at sunset": ([1.12, 0.74, 0.46], [1.0, -0.2]),
    "by moonlight": ([0.42, 0.52, 0.90], [-0.7, -0.7]),
    "under neon": ([1.05, 0.50, 1.08], [-1.0, 0.3]),
}
CONTEXT = {  # the words are the prompt's
    "scene": list(SCENES),
    "accessory": ["", "with a hat", "with a balloon", "with a scarf"],
    "light": list(LIGHTS),
}
COLUMN = {name: k for k, name in enumerate([*IDENTITY, *CONTEXT, "pose"])}  # attribute -> its place
N_IDENTITY = len(IDENTITY)  # columns of the identity come first, then the context's, then the pose
SCENE, ACCESSORY, LIGHT = range(len(CONTEXT))  # columns of a context
NAMED = 2  # attributes that the prompt names: shape and ears
RADIX = [len(values) - (name == "second") for name, values in IDENTITY.items()]
N_IDENTITIES = math.prod(RADIX)
# Shares of pretraining sheets: in SLIPS one panel shows a critter that differs in one or two
# attributes, in UNRELATED some panels, but not all, show other critters of the same noun. In OTHER
# of these the caption says so, with "other" in place of "the same".
SLIPS = 0.1
UNRELATED = 1 / 5
OTHER = 0.9
# Share of single panels' captions that also name colours, pattern and eyes, so that these words are
# known. Sheets' captions never do: where words tell the details, no panel needs the others.
DETAILED = 0.3
# The prompt's words -> how far right and down the critter's place moves (a panel is 2 wide and 2
# high), what its size is multiplied by, quarter turns clockwise. Shifts are five pixels of 32;
# turned critters are smaller, so that their ears stay inside.
POSES = {
    "": (0.0, 0.0, 1.0, 0),
    "on the left": (-0.34, 0.0, 0.92, 0),
    "on the right": (0.34, 0.0, 0.92, 0),
    "jumping": (0.0, -0.34, 0.85, 0),
    "lying down": (0.20, 0.12, 0.85, -1),
    "upside down": (0.0, -0.32, 0.85, 2),
}
# In labels and tables; a prompt says nothing of a standing critter.
POSE_NAMES = [pose or "standing" for pose in POSES]

_EAR_X = [0.27, 0.28, 0.20, 0.17, 0.27, 0.25]  # ear anchors, one for each body shape
_EAR_Y = [-0.38, -0.40, -0.48, -0.46, -0.26, -0.38]
_TOP_Y = [-0.48, -0.42, -0.58, -0.56, -0.50, -0.48]  # where a hat sits
_EYES = [  # where one, two and three of them are
    [(0.0, -0.10)],
    [(-0.17, -0.10), (0.17, -0.10)],
    [(-0.16, -0.02), (0.16, -0.02), (0.0, -0.27)],
]


# ---- identities and contexts as integers ---------------------------------------------------------
def identity_of(index):
    """Identity numbers (N,) -> attribute values (N, N_IDENTITY), columns as in IDENTITY."""
    index, columns = torch.as_tensor(index).clone(), []
    if ((index < 0) | (index >= N_IDENTITIES)).any():
        raise ValueError(f"the world has {N_IDENTITIES} identities, numbered from 0")
    for radix in RADIX:
        columns.append(index % radix)
        index = index // radix
    colour, second = COLUMN["colour"], COLUMN["second"]
    columns[second] = (columns[colour] + 1 + columns[second]) % len(COLOURS)
    return torch.stack(columns, 1)


def is_held_out(index):
    """True for the tenth of the identities (N,) that no training set may contain."""
    return torch.as_tensor(index) * 2654435761 % 2**32 // 2**16 % 10 == 0


def draw_identities(n, generator, held_out=False):
    """`n` random identity numbers (n,), of the training side or of the held-out side."""
    index = torch.randint(N_IDENTITIES, (n * 16 + 64,), generator=generator)
    while True:
        kept = index[is_held_out(index) == held_out]
        if len(kept) >= n:
            return kept[:n]
        index = torch.cat([index, torch.randint(N_IDENTITIES, (n * 16 + 64,), generator=generator)])


def draw_contexts(n, generator):
    """`n` random contexts (n, 3): scene, accessory, light."""
    columns = [torch.randint(len(v), (n,), generator=generator) for v in CONTEXT.values()]
    return torch.stack(columns, 1)


def draw_poses(n, generator):
    """`n` random poses (n, 4): centre x, centre y, size, tilt (radians).

    They differ little, a pixel in place, 4 % in size, 4 degrees in tilt: no input foretells the
    jitter, and with a larger one that doubt was more than half of the student's loss (LOG.md)."""
    u = torch.rand(n, 4, generator=generator) * 2 - 1
    return torch.tensor([0, 0.16, 1.16, 0]) + torch.tensor([0.06, 0.03, 0.05, 0.07]) * u


def in_pose(pose, named):
    """Poses (n, 4) as of `draw_poses`, and for each the number (n,) of a named one -> how it then
    stands (n, 4)."""
    right, down, size, turns = torch.tensor(list(POSES.values()))[named].unbind(1)
    x, y, scale, tilt = pose.unbind(1)
    return torch.stack([x + right, y + down, scale * size, tilt + turns * (torch.pi / 2)], 1)


def move(a, b):
    """How a critter gets from one named pose to another, by their numbers: "same pose", "moved" or
    "turned"."""
    turns = [turns for _, _, _, turns in POSES.values()]
    return "same pose" if a == b else "turned" if turns[a] != turns[b] else "moved"


def change_attributes(identity, count, generator):
    """Copies of `identity` (N, N_IDENTITY) in which `count` (N,) randomly chosen attributes take
    another value."""
    other, sizes = identity.clone(), [len(v) for v in IDENTITY.values()]
    order = torch.rand(identity.shape, generator=generator).argsort(1)
    for column, size in enumerate(sizes):
        place = (order == column).float().argmax(1)  # of this column in the shuffle
        step = torch.randint(1, size, (len(identity),), generator=generator)
        changed = (identity[:, column] + step) % size
        other[:, column] = torch.where(place < count, changed, identity[:, column])
    clash = other[:, COLUMN["colour"]] == other[:, COLUMN["second"]]
    if clash.any():  # main and second colour are never equal: draw these again
        other[clash] = change_attributes(identity[clash], count[clash], generator)
    return other


def identity_number(identity):
    """Attribute values (N, N_IDENTITY) -> identity numbers (N,), the inverse of `identity_of`."""
    digits, number = identity.clone(), torch.zeros(len(identity), dtype=torch.long)
    colour, second = COLUMN["colour"], COLUMN["second"]
    digits[:, second] = (identity[:, second] - identity[:, colour] - 1) % len(COLOURS)
    for column in reversed(range(N_IDENTITY)):
        number = number * RADIX[column] + digits[:, column]
    return number


def change_in_training(identity, count, generator):
    """`change_attributes`, drawn again where the result is a held-out identity."""
    changed = change_attributes(identity, count, generator)
    while (bad := is_held_out(identity_number(changed))).any():
        changed[bad] = change_attributes(identity[bad], count[bad], generator)
    return changed


def draw_namesakes(index, generator, held_out=False):
    """For identity numbers (N,) other ones (N,) of the same noun, of the side asked for: shape and
    ears are the number's lowest digits, all else is drawn anew."""
    nouns, other = math.prod(RADIX[:NAMED]), index.clone()
    while (bad := (is_held_out(other) != held_out) | (other == index)).any():
        drawn = torch.randint(N_IDENTITIES // nouns, index.shape, generator=generator)
        other = torch.where(bad, index % nouns + nouns * drawn, other)
    return other


# ---- words ---------------------------------------------------------------------------------------
def noun(identity):
    """What the prompt calls the critter: "round cat-eared critter". `identity` is one row of
    numbers."""
    return f"{IDENTITY['shape'][identity[0]]} {IDENTITY['ears'][identity[1]]} critter"


def details(identity):
    """What only a picture tells: "blue with red belly and two eyes"."""
    words = {name: values[int(v)] for (name, values), v in zip(IDENTITY.items(), identity)}
    pattern = "trim" if words["pattern"] == "plain" else words["pattern"]
    eyes = "eye" if words["eyes"] == "one" else "eyes"
    return f"{words['colour']} with {words['second']} {pattern} and {words['eyes']} {eyes}"


def setting(context, light=True, pose=0):
    """The pose, unless the critter stands, and the context in words: "jumping on the beach at
    sunset with a hat"."""
    scene, accessory, lamp = (values[int(v)] for values, v in zip(CONTEXT.values(), context))
    return " ".join(
        part for part in (list(POSES)[pose], scene, lamp if light else "", accessory) if part
    )


def panel_caption(identity, context, detailed=False, pose=0):
    """As in "a round cat-eared critter on the beach at sunset with a hat"; detailed: coloured."""
    words = [noun(identity), details(identity) if detailed else "", setting(context, pose=pose)]
    return "a " + " ".join(filter(None, words))


ORDINALS = ["first", "second", "third", "fourth"]
SHEET_OPENINGS = {  # layout (rows, columns) -> ways to say it; the first is generate_grids.py's
    (2, 2): [
        "a grid of 4 images representing the same {}",
        "an image of evenly separated 4 panels showing identical {}",
    ],
    (1, 2): ["2 images representing the same {}", "an image of 2 panels showing identical {}"],
}


def opposite(opening):
    """The opening of a sheet of several subjects: "a grid of 4 images representing other {}"."""
    return opening.replace("the same", "other").replace("identical", "other")


def sheet_caption(
    identity, contexts, layout=(2, 2), relight=False, wording=0, poses=(0, 0, 0, 0), other=False
):
    """The prompt of a sheet: its opening, the subject, then each panel in reading order.

    Subject: "a grid of 4 images representing the same round horned critter: first in the snow at
    noon, second ...". Relight: the scene and the pose are told once, and each panel names its light
    only."""
    subject = noun(identity)
    opening = SHEET_OPENINGS[layout][wording]
    if other:
        opening = opposite(opening)
    if relight:
        head = opening.format(f"scene, a {subject} {setting(contexts[0], False, poses[0])}")
        panels = [CONTEXT["light"][int(c[2])] for c in contexts]
    else:
        head = opening.format(subject)
        panels = [setting(c, pose=pose) for c, pose in zip(contexts, poses)]
    return f"{head}: " + ", ".join(f"{o} {p}" for o, p in zip(ORDINALS, panels))


# ---- drawing -------------------------------------------------------------------------------------
def _circle(x, y, r):
    return (x * x + y * y).sqrt() - r


def _ellipse(x, y, a, b):  # not an exact distance, near enough for a soft edge
    return (((x / a) ** 2 + (y / b) ** 2).sqrt() - 1) * min(a, b)


def _box(x, y, a, b, r=0.0):
    qx, qy = x.abs() - a + r, y.abs() - b + r
    outside = (qx.clamp(min=0) ** 2 + qy.clamp(min=0) ** 2).sqrt()
    return outside + torch.maximum(qx, qy).clamp(max=0) - r


def _triangle(x, y, a, top, bottom):  # its tip at (0, top), its base of half-width a at bottom
    length = (a * a + (bottom - top) ** 2) ** 0.5
    side = (x.abs() * (bottom - top) - (y - top) * a) / length
    return torch.maximum(side, y - bottom)


def _body(shape, x, y):
    if shape == 0:
        return _circle(x, y, 0.48)
    if shape == 1:
        return _box(x, y, 0.43, 0.43, 0.10)
    if shape == 2:
        return _ellipse(x, y, 0.34, 0.58)
    if shape == 3:
        low, high = _circle(x, y - 0.10, 0.42), _circle(x, y + 0.30, 0.27)
        h = (0.5 + 0.5 * (low - high) / 0.25).clamp(0, 1)  # smooth union
        return low + (high - low) * h - 0.25 * h * (1 - h)
    if shape == 4:
        return _triangle(x, y, 0.52, -0.50, 0.38) - 0.05
    skirt = _box(x, y - 0.12, 0.42, 0.36) + 0.07 * (1 + torch.cos(x * 22)) * (y > 0.3)
    return torch.minimum(_circle(x, y + 0.06, 0.42), skirt)


def _ears(kind, x, y, ex, ey):  # x is mirrored: both ears at once
    u, v = x.abs() - ex, y - ey
    if kind == 0:
        return torch.full_like(x, 9.0)
    if kind == 1:
        return _triangle(u - 0.03, v, 0.16, -0.26, 0.14)
    if kind == 2:
        return _ellipse(u - 0.02, v + 0.20, 0.10, 0.34)
    if kind == 3:
        lean = u - 0.10 + 0.6 * (v + 0.05)  # horns lean outwards
        return _triangle(lean, v, 0.085, -0.30, 0.12)
    stalk = _box(u - 0.06 + 0.25 * (v + 0.14), v + 0.14, 0.032, 0.22)
    return torch.minimum(stalk, _circle(u - 0.12, v + 0.36, 0.105))


def render(identity, context, pose, size=32):
    """Panels (N, 3, size, size) in [0, 1], drawn on the device that the arguments are on: critters
    `identity` (N, N_IDENTITY) in `context` (N, 3) and `pose` (N, 4).

    Drawn at twice the size and averaged down; on a CPU 32 panels at a time, which fit into its
    cache."""
    n = len(identity) if identity.is_cuda else 32
    parts = zip(identity.split(n), context.split(n), pose.split(n))
    with identity.device:  # where tensors are made that follow no other
        return torch.cat([_render(*part, size) for part in parts])


def _look_up(table, index):
    return torch.tensor(table)[index]


def _rgb(*colour):
    return torch.tensor(colour).view(1, 3, 1, 1)


def _only(chosen, distance):
    """The distance (N, S, S) where `chosen` (N,), and far away elsewhere."""
    return torch.where(chosen.view(-1, 1, 1), distance, torch.full_like(distance, 9.0))


def _render(identity, context, pose, size):
    n, s = len(identity), size * 2
    line = (torch.arange(s) + 0.5) / s * 2 - 1
    Y, X = torch.meshgrid(line, line, indexing="ij")
    X, Y = X.expand(n, s, s), Y.expand(n, s, s)
    soft = 2.0 / s  # half the width of a soft edge
    scene, accessory, light = context.unbind(1)

    def mask(distance):
        return (0.5 - distance / (2 * soft)).clamp(0, 1).unsqueeze(1)  # (N, 1, S, S)

    def paint(image, distance, colour):
        return image + mask(distance) * (colour - image)

    casts, lamps = zip(*LIGHTS.values())
    cast, lamp = _look_up(casts, light).view(n, 3, 1, 1), _look_up(lamps, light)
    image = _background(scene, X, Y, paint) * cast

    # the critter's own frame: x, y (N, S, S)
    cx, cy, scale, tilt = (p.view(n, 1, 1) for p in pose.unbind(1))
    dx, dy = (X - cx) / scale, (Y - cy) / scale
    x, y = dx * tilt.cos() + dy * tilt.sin(), dy * tilt.cos() - dx * tilt.sin()
    critter, whole = _critter(image, identity, x, y, paint)
    top = _look_up(_TOP_Y, identity[:, COLUMN["shape"]]).view(n, 1, 1)
    critter = _accessory(critter, accessory, x, y, top, paint)

    # light: the critter has less of the cast than the scene, and a shade away from the lamp
    toward = (dx * lamp[:, 0].view(n, 1, 1) + dy * lamp[:, 1].view(n, 1, 1)).unsqueeze(1)
    lit = critter * (0.70 + 0.30 * cast) * (1 + 0.30 * toward.clamp(-0.6, 0.6))
    covered = (mask(whole) + (critter != image).any(1, keepdim=True)).clamp(0, 1)
    image = image + covered * (lit - image)
    return F.avg_pool2d(image.clamp(0, 1), 2)


def _critter(image, identity, x, y, paint):
    """The critter without accessory and light, painted on `image`, and the distance to it
    (N, S, S). x, y (N, S, S): the critter's own frame."""
    n = len(identity)
    shape, ears, colour, second, pattern, eyes = identity.unbind(1)
    palette = torch.tensor(list(COLOURS.values()))
    main, trim = palette[colour].view(n, 3, 1, 1), palette[second].view(n, 3, 1, 1)
    ink = _rgb(0.08, 0.06, 0.10)

    body, ear = torch.empty_like(x), torch.empty_like(x)
    for k in range(len(IDENTITY["shape"])):
        i = shape == k
        body[i] = _body(k, x[i], y[i])
    for k in range(len(IDENTITY["ears"])):
        i = ears == k
        ear_x, ear_y = (_look_up(table, shape[i]).view(-1, 1, 1) for table in (_EAR_X, _EAR_Y))
        ear[i] = _ears(k, x[i], y[i], ear_x, ear_y)
    feet = _ellipse(x.abs() - 0.21, y - 0.47, 0.19, 0.13)

    for part, fill in ((ear, trim), (feet, trim), (body, main)):
        image = paint(image, part - 0.035, ink)  # an outline, then the fill
        image = paint(image, part, fill)
    marks = torch.full_like(x, 9.0)
    areas = {  # large ones, each seen beside every accessory
        "belly": _ellipse(x, y - 0.20, 0.24, 0.22),
        "trousers": 0.14 - y,
        "hood": y + 0.20,
        "side": x,
    }
    for name, area in areas.items():
        worn = pattern == IDENTITY["pattern"].index(name)
        marks[worn] = area[worn]
    image = paint(image, torch.maximum(marks, body + 0.02), trim)
    image = _face(image, eyes, x, y, paint)
    return image, torch.stack([body, ear, feet]).amin(0) - 0.035


def _background(scene, X, Y, paint):
    n = len(scene)
    skies, grounds = zip(*SCENES.values())
    sky, ground = (_look_up(table, scene).view(n, 3, 1, 1) for table in (skies, grounds))
    image = sky * (1 + 0.10 * Y.unsqueeze(1))
    trunks = torch.sin(X * 9 + 1).abs() * 0.12 - 0.045
    stalactites = Y + 0.95 - 0.40 * torch.sin(X * 8) ** 2
    roof = -0.55 + 0.35 * torch.cos((X * 2.5).round() * 2.2) - Y
    towers = torch.maximum(torch.sin(X * 7.85).abs() * -0.13 + 0.04, roof)
    pane = ((X * 5) % 1 - 0.5).abs().maximum(((Y * 5) % 1 - 0.5).abs()) * 0.2 - 0.045
    windows = torch.maximum(towers + 0.06, pane)
    things = [  # number of the scene, distance, colour
        (1, 0.10 - Y, _rgb(0.12, 0.42, 0.78)),  # the sea
        (2, trunks, _rgb(0.30, 0.19, 0.10)),
        (3, stalactites, _rgb(0.42, 0.34, 0.31)),
        (4, _circle(X - 0.62, Y + 0.62, 0.22), _rgb(1.0, 0.97, 0.72)),  # a big sun
        (5, towers, _rgb(0.40, 0.42, 0.52)),
        (5, windows, _rgb(1.0, 0.90, 0.45)),
        (7, _star(X, Y), _rgb(1.0, 1.0, 0.9)),
    ]
    for k, distance, colour in things:
        image = paint(image, _only(scene == k, distance), colour)
    hill = 0.42 + 0.06 * torch.sin(X * 4 + scene.view(n, 1, 1))
    image = paint(image, hill - Y, ground)
    across, down = (X * 3.1 + 0.3) % 1 - 0.5, (Y * 3.1 + 0.2 * torch.sin(X * 9)) % 1 - 0.5
    speck = (across**2 + down**2).sqrt() * 0.32
    image = paint(image, _only(scene == 0, speck - 0.05), _rgb(1.0, 1.0, 1.0))  # flakes everywhere
    flowers = torch.maximum(speck - 0.05, 0.50 - Y)
    return paint(image, _only(scene == 6, flowers), _rgb(1.0, 0.85, 0.95))


def _star(X, Y):
    u, v = (X * 2.3 + 0.37 * torch.sin(Y * 7).round()) % 1 - 0.5, (Y * 2.9) % 1 - 0.5
    return (u.abs() + v.abs()) * 0.4 - 0.035


def _face(image, eyes, x, y, paint):
    n = len(eyes)
    white, black = _rgb(0.98, 0.98, 0.98), _rgb(0.05, 0.04, 0.08)
    nearest = []  # for each number of eyes, the distance to the nearest one
    for places in _EYES:
        to_eyes = [((x - a) ** 2 + (y - b) ** 2).sqrt() for a, b in places]
        nearest.append(torch.stack(to_eyes).amin(0))
    d = torch.stack(nearest)[eyes, torch.arange(n)]  # (N, S, S)
    radius = torch.tensor([0.20, 0.135, 0.115])[eyes].view(n, 1, 1)
    image = paint(image, d - radius - 0.025, black)
    image = paint(image, d - radius, white)
    return paint(image, d - radius * 0.52, black)


def _accessory(image, kind, x, y, top, paint):
    hat, balloon, scarf = (kind == k for k in (1, 2, 3))
    v = y - top
    felt = torch.minimum(_box(x, v + 0.14, 0.15, 0.17), _box(x, v - 0.02, 0.25, 0.045))
    ball = _ellipse(x - 0.56, y + 0.46, 0.19, 0.23)
    wool = torch.minimum(_box(x, y - 0.13, 0.40, 0.06, 0.04), _box(x - 0.22, y - 0.28, 0.065, 0.15))
    parts = [  # who has it, distance, colour
        (hat, felt, _rgb(0.10, 0.10, 0.12)),
        (hat, _box(x, v + 0.04, 0.15, 0.04), _rgb(0.95, 0.78, 0.20)),  # its ribbon
        (balloon, _box(x - 0.56, y - 0.02, 0.018, 0.40), _rgb(0.95, 0.95, 0.95)),  # its string
        (balloon, ball - 0.025, _rgb(0.08, 0.06, 0.10)),
        (balloon, ball, _rgb(0.92, 0.10, 0.12)),
        (scarf, wool - 0.03, _rgb(0.08, 0.06, 0.10)),
        (scarf, wool, _rgb(0.55, 0.57, 0.62)),  # grey: no critter is
    ]
    for wearers, distance, colour in parts:
        image = paint(image, _only(wearers, distance), colour)
    return image


# ---- sheets --------------------------------------------------------------------------------------
def sheet_identities(n, generator, p, held_out=False):
    """Which critter each of the `p` panels of `n` sheets shows (n, p, N_IDENTITY), and which sheets
    are unrelated (n,).

    Most sheets show one critter; the others slip as SLIPS and UNRELATED say."""
    number = draw_identities(n, generator, held_out)
    identity = identity_of(number)
    panels = identity[:, None].repeat(1, p, 1)  # (n, p, N_IDENTITY)
    kind = torch.rand(n, generator=generator)
    changed = change_attributes(identity, torch.randint(1, 3, (n,), generator=generator), generator)
    changed[:, :NAMED] = identity[:, :NAMED]  # shape and ears are in the prompt: they stay
    if p == 1:
        return panels, torch.zeros(n, dtype=torch.bool)
    odd = kind > 1 - SLIPS
    odd &= is_held_out(identity_number(changed)) == held_out  # a slip into the other side stays out
    panels[odd, torch.randint(p, (n,), generator=generator)[odd]] = changed[odd]
    unrelated = kind < UNRELATED
    others = torch.randint(1, p, (n, 1), generator=generator)  # how many panels
    other = torch.rand(n, p, generator=generator).argsort(1) < others  # (n, p), which ones
    other &= unrelated[:, None]
    namesakes = draw_namesakes(number[:, None].expand(n, p)[other], generator, held_out)
    panels[other] = identity_of(namesakes)
    return panels, unrelated


def sheets(n, generator, layout=(2, 2), size=32, held_out=False, device="cpu"):
    """`n` pretraining sheets: images (n, 3, rows * size, columns * size) in [0, 1] on `device`, and
    their captions.

    Most show one critter; the others slip as SLIPS and UNRELATED say. 30 % of the sheets are of the
    family *relight* (same scene, accessory and pose, another light in each panel), the others
    *subject* (all contexts and poses free). A 1x1 sheet is a single panel."""
    rows, columns = layout
    p = rows * columns
    panels, unrelated = sheet_identities(n, generator, p, held_out)
    identity = panels[:, 0]  # captions need its shape and ears, which all panels of a sheet share
    context = draw_contexts(n * p, generator).view(n, p, 3)
    pose = draw_poses(n * p, generator).view(n, p, 4)
    named = torch.randint(len(POSES), (n, p), generator=generator)
    relight = (torch.rand(n, generator=generator) < 0.3) & (p > 1)
    context[relight, :, :2] = context[relight, :1, :2]
    pose[relight], named[relight] = pose[relight, :1], named[relight, :1]
    lights = torch.rand(n, 4, generator=generator).argsort(1)[:, :p]
    context[relight, :, 2] = lights[relight]
    stand = in_pose(pose.flatten(0, 1), named.flatten())
    shown = (x.to(device) for x in (panels.flatten(0, 1), context.flatten(0, 1), stand))
    images = render(*shown, size)
    cells = images.view(n, rows, columns, 3, size, size).permute(0, 3, 1, 4, 2, 5)
    images = cells.flatten(4, 5).flatten(2, 3)  # (n, 3, rows * size, columns * size)
    draw, named = torch.rand(n, 2, generator=generator), named.tolist()
    detailed = draw[:, 0] < DETAILED
    said = unrelated & (draw[:, 0] < OTHER)  # the caption tells that they are not all the same
    other_wording = draw[:, 1] < 0.3
    captions = []
    for i in range(n):
        if p == 1:
            caption = panel_caption(identity[i], context[i, 0], bool(detailed[i]), named[i][0])
        else:
            ways = bool(relight[i]), int(other_wording[i]), named[i], bool(said[i])
            caption = sheet_caption(identity[i], context[i], layout, *ways)
        captions.append(caption)
    return images, captions
