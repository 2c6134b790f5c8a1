"""Chest radiographs drawn from formulas: the healthy chest, the marks that findings leave on it, and the exposed film.

Coordinates run over the canonical film from -1 to 1, x to the right and y downwards; as on a radiograph, the patient's
right is the image's left. Everything is float32 [N, S, S], and N is kept so small that a block stays in the cache: that
is worth more than any other trick here. Shapes: N studies of a block, S pixels a side; scalars per study are [N, 1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from fedmix.data.anatomy import Anatomy, Field, Film, Grain
from fedmix.data.findings import COLUMN, Findings

RIGHT, LEFT = -1.0, 1.0  # sign of x on the patient's right and left


@dataclass(frozen=True)
class Scene:
    """Where each pixel of a block lies in its patient; each [N, S, S] unless noted."""

    x: Field
    y: Field
    side: Field  # -1 on the patient's right, 1 on the left
    lateral: Field  # across the lung: -1 at the mediastinum, 1 at the chest wall
    vertical: Field  # along the lung: -1 at the apex, 1 at the bottom of its ellipse
    diaphragm: Field  # y of the dome above or below this pixel
    lung: Field  # 1 inside aerated lung, soft at the edges
    texture: Field
    edge: float  # turns a distance into a ramp of a few pixels, whatever the size

    def rows(self, chosen: NDArray[np.int64]) -> Scene:
        """Return the scene of some studies only."""
        arrays = {field.name: getattr(self, field.name)[chosen] for field in fields(self) if field.name != "edge"}
        return Scene(**arrays, edge=self.edge)


def _inside(distance: Field) -> Field:
    """Ramp from 0 to 1 where ``distance`` crosses zero from below; overwrites its argument."""
    distance += 0.5
    np.clip(distance, 0, 1, out=distance)
    return distance


def _column(values: Field) -> Field:
    return np.asarray(values, np.float32).reshape(-1, 1, 1)


def lay_out(anatomy: Anatomy, film: Film, grain: Grain) -> Scene:
    """Place the patients on their films."""
    size = grain.noise.shape[-1]
    centre = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    film_x = centre - _column(film.shift_x)
    film_y = centre[:, None] - _column(film.shift_y)
    cosine, sine = _column(np.cos(film.rotation) * film.zoom), _column(np.sin(film.rotation) * film.zoom)
    x = (cosine * film_x + sine * film_y) * _column(anatomy.aspect)
    y = cosine * film_y - sine * film_x
    side = np.copysign(np.float32(1), x)
    lateral = (x * side - _column(anatomy.lung_x)) / _column(anatomy.lung_width)
    vertical = (y - _column(anatomy.lung_y)) / _column(anatomy.lung_height)
    # The heart pushes the left dome down; both are higher in the middle than at the costophrenic angle.
    diaphragm = _column(anatomy.diaphragm_y + film.inspiration + 0.025) + 0.025 * side - 0.12 * (1 - lateral * lateral)
    edge = size / 4.0
    oval = np.abs(lateral) ** 2.4 + np.abs(vertical) ** 2.6
    lung = _inside((1 - oval) * 3.0) * _inside((diaphragm - y) * (0.8 * edge))
    return Scene(x, y, side, lateral, vertical, diaphragm, lung, grain.lung, edge)


def draw_chest(scene: Scene, anatomy: Anatomy, film: Film, heart_scale: Field) -> Field:
    """Draw the healthy chest [N, S, S] with hearts ``heart_scale`` [N] times the usual size."""
    x, y, lung = scene.x, scene.y, scene.lung
    across = x * scene.side
    body_width = _column(anatomy.body_width)
    body = _inside((body_width - 0.5 * np.clip(-y - 0.55, 0, 1) - across) * 8)
    image: Field = 0.42 * body * (1 + 0.25 * y) - 0.30 * lung
    vessels = np.clip(1.1 - np.abs(scene.lateral + 0.7), 0, 1)
    image += 0.02 * lung * scene.texture * (0.5 + vessels)
    wave = np.sin(_column(anatomy.rib_frequency) * (y - 0.35 * across + 0.25 * x * x) + _column(anatomy.rib_phase))
    ribs = np.clip(wave - 0.35, 0, 1) * (across < body_width - 0.05) * _inside((0.55 - y) * 3) * _inside((across - 0.1) * 8)
    image += _column(anatomy.rib_grey) * ribs * body
    clavicle = _inside((0.035 - np.abs(y + 0.56 + 0.22 * across)) * (0.9 * scene.edge))
    image += 0.10 * clavicle * (across > 0.08) * (across < 0.75)
    spine = _inside((0.14 + 0.05 * np.clip(y, 0, 1) + 0.05 * np.clip(-y - 0.5, 0, 1) - np.abs(x - 0.02)) * 10)
    image += _column(anatomy.spine_grey) * spine * body
    image += 0.24 * _heart(scene, anatomy, heart_scale * film.heart_enlargement) * np.maximum(lung, 0.35 * body)
    image += 0.10 * _inside((y - scene.diaphragm) * (0.7 * scene.edge)) * body * (across < 0.8)
    return image


def _heart(scene: Scene, anatomy: Anatomy, scale: Field) -> Field:
    grown = _column(scale + anatomy.heart_size)
    left = (scene.x - _column(anatomy.heart_x) - 0.0675 * (grown - 1)) / (0.27 * grown)
    down = (scene.y - 0.26) / (0.27 * (1 + 0.5 * (grown - 1)))
    return _inside((1 - left * left - down * down) * 3) * _inside((0.62 - scene.y) * 6)


def heart_scale(findings: Findings) -> Field:
    """Size [N] of each heart's shadow against a healthy one."""
    column = COLUMN["cardiomegaly"]
    enlarged = 1.20 + 0.15 * findings.severity[:, column]
    return np.where(findings.present[:, column], enlarged, 1.0).astype(np.float32)


def effusion(scene: Scene, severity: NDArray[np.int64], jitter: Field, side: float) -> Field:
    """Fluid that fills the lung's base on one side, higher at the chest wall."""
    height = _column(np.array([0.10, 0.26, 0.45], np.float32)[severity] + 0.03 * jitter[:, 0])
    dome = scene.diaphragm + 0.12 * (1 - scene.lateral * scene.lateral)
    level = dome - height - 0.14 * np.clip(scene.lateral, 0, 1) ** 3 + 0.02 * (1 - scene.lateral)
    fluid: Field = _inside((scene.y - level) * (0.45 * scene.edge)) * np.clip(1.4 * scene.lung, 0, 1)
    fluid *= 0.20 * (scene.side == side)
    return fluid


def pneumothorax(scene: Scene, severity: NDArray[np.int64], side: float) -> Field:
    """Air around a lung that has shrunk towards the hilum: no texture outside a thin pleural line."""
    collapse = _column(np.array([0.16, 0.30, 0.50], np.float32)[severity])
    oval = np.abs(scene.lateral + 0.9 * collapse) ** 2.4 + np.abs(scene.vertical - 0.55 * collapse) ** 2.6
    where = scene.lung * (scene.side == side)
    air = _inside((oval - 1) * 4) * where
    line = _inside((0.10 - np.abs(oval - 1)) * 6) * where
    change: Field = 0.06 * line - 0.09 * air - 0.02 * scene.texture * air
    return change


def consolidation(scene: Scene, severity: NDArray[np.int64], zone: NDArray[np.int64], jitter: Field) -> Field:
    """A ragged, fluffy opacity in one of six zones."""
    centre_x = _column(np.where(zone < 3, RIGHT, LEFT) * (0.42 + 0.08 * jitter[:, 0]))
    centre_y = _column(np.array([-0.45, -0.08, 0.26])[zone % 3] + 0.05 * jitter[:, 1])
    radius = _column(np.array([0.11, 0.16, 0.22])[severity] * np.clip(1 + 0.15 * jitter[:, 2], 0.6, 1.4))
    distance = ((scene.x - centre_x) ** 2 + (scene.y - centre_y) ** 2) / (radius * radius) + 0.5 * scene.texture
    opacity: Field = 0.20 * np.exp(-0.8 * np.clip(distance, 0, 8)) * np.clip(scene.lung + 0.15, 0, 1)
    return opacity


def nodule(scene: Scene, severity: NDArray[np.int64], zone: NDArray[np.int64], jitter: Field) -> Field:
    """A small round density in one of six zones."""
    centre_x = _column(np.where(zone < 3, RIGHT, LEFT) * (0.44 + 0.06 * np.clip(jitter[:, 0], -1.7, 1.7)))
    centre_y = _column(np.array([-0.42, -0.08, 0.22])[zone % 3] + 0.06 * jitter[:, 1])
    radius = _column(np.array([0.055, 0.075, 0.10])[severity])
    return 0.22 * _inside((radius - np.hypot(scene.x - centre_x, scene.y - centre_y)) * (0.9 * scene.edge))


def edema(scene: Scene, severity: NDArray[np.int64], grain: Field) -> Field:
    """Haze that spreads from both hila, with fine grain."""
    haze: Field = np.clip(1.25 - 0.8 * np.abs(scene.lateral + 0.9), 0, 1.2)
    return _column(np.array([0.04, 0.07, 0.11])[severity]) * (haze + 0.55 * grain) * scene.lung


def pacemaker(scene: Scene, jitter: Field) -> Field:
    """A box under the left clavicle and a lead to the heart."""
    box_x, box_y = _column(0.48 + 0.09 * jitter[:, 0]), _column(np.clip(-0.42 + 0.09 * jitter[:, 1], -0.7, -0.1))
    box = _inside((0.095 - np.maximum(np.abs(scene.x - box_x), 1.2 * np.abs(scene.y - box_y))) * (0.9 * scene.edge))
    way = np.sqrt(np.clip((scene.y - box_y) / (0.30 - box_y), 0, 1))
    lead = _inside((0.022 - np.abs(scene.x - box_x - (0.05 - box_x) * way)) * scene.edge)
    return 0.28 * box + 0.14 * lead * (scene.y > box_y) * (scene.y < 0.3)


def tube(scene: Scene, severity: NDArray[np.int64], jitter: Field) -> Field:
    """A tube in the trachea; its tip is high, well placed or low."""
    tip = _column(np.array([-0.35, -0.25, -0.15])[severity])
    centre = _column(0.02 + 0.02 * jitter[:, 0])
    return 0.22 * _inside((0.035 - np.abs(scene.x - centre)) * scene.edge) * (scene.y < tip)


def marks(scene: Scene, findings: Findings, grain: Grain) -> Iterator[tuple[NDArray[np.int64], Field]]:
    """Yield for each finding the studies that have it and what it adds to their pixels, at contrast 1."""

    def having(label: str) -> tuple[NDArray[np.int64], Scene, NDArray[np.int64], Field]:
        rows = np.flatnonzero(findings.present[:, COLUMN[label]])
        return rows, scene.rows(rows), findings.severity[rows, COLUMN[label]], findings.jitter[rows, COLUMN[label]]

    for side, name in ((RIGHT, "right"), (LEFT, "left")):
        rows, part, severity, jitter = having(f"effusion_{name}")
        yield rows, effusion(part, severity, jitter, side)
        rows, part, severity, _ = having(f"pneumothorax_{name}")
        yield rows, pneumothorax(part, severity, side)
    rows, part, severity, jitter = having("consolidation")
    yield rows, consolidation(part, severity, findings.consolidation_zone[rows], jitter)
    rows, part, severity, jitter = having("nodule")
    yield rows, nodule(part, severity, findings.nodule_zone[rows], jitter)
    rows, part, severity, _ = having("edema")
    yield rows, edema(part, severity, grain.edema[rows])
    rows, part, _, jitter = having("pacemaker")
    yield rows, pacemaker(part, jitter)
    rows, part, severity, jitter = having("tube")
    yield rows, tube(part, severity, jitter)


def _blurred(image: Field, deviation: float) -> Field:
    """Gaussian blur; ``deviation`` in half image widths. No matrix products: BLAS threads fight over small ones."""
    size = image.shape[-1]
    pixels = deviation * size / 2
    radius = math.ceil(3 * pixels)
    weights = [math.exp(-0.5 * (step / pixels) ** 2) for step in range(radius + 1)]
    norm = 2 * sum(weights) - weights[0]
    for _ in range(2):  # down the columns, turned, and down again
        padded = np.pad(image, ((0, 0), (radius, radius), (0, 0)), mode="edge")
        image = padded[:, radius : radius + size] * (weights[0] / norm)
        for step in range(1, radius + 1):
            above, below = padded[:, radius - step :][:, :size], padded[:, radius + step :][:, :size]
            image += (above + below) * (weights[step] / norm)
        image = image.swapaxes(1, 2)
    return image


def expose(image: Field, film: Film, grain: Grain, blur: float) -> NDArray[np.uint8]:
    """Turn drawn chests into films: blur, scatter, exposure curve, noise, collimation, and levelling to grey values."""
    size = image.shape[-1]
    if blur > 0:
        image = _blurred(image, blur)
    image += _column(film.scatter) * grain.scatter
    image = np.clip(image * _column(film.contrast) + _column(film.brightness), 0.001, 1.2) ** _column(film.gamma)
    image += _column(film.noise) * grain.noise
    centre = np.abs((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1)
    border = _column(film.border)
    image[(centre > border) | (centre[:, None] > border)] = 0.02
    # Every hospital levels its films before they are read; without this, brightness alone would tell sites apart.
    # Flat rows: over two axes, numpy's order of summation depends on how many studies share the block.
    flat = image.reshape(len(image), -1)
    flat = (flat - flat.mean(axis=1, keepdims=True)) * (0.2 / flat.std(axis=1, keepdims=True))
    grey: NDArray[np.uint8] = (np.clip(flat + 0.5, 0, 1) * 255).astype(np.uint8)
    return grey.reshape(image.shape)


def render(
    anatomy: Anatomy, film: Film, findings: Findings, grain: Grain, *, contrast: float = 1.7, blur: float = 0.0
) -> NDArray[np.uint8]:
    """Render a block of studies as grey values [N, S, S]; ``contrast`` scales what findings add to the pixels."""
    scene = lay_out(anatomy, film, grain)
    image = draw_chest(scene, anatomy, film, heart_scale(findings))
    for rows, mark in marks(scene, findings, grain):
        image[rows] += contrast * mark
    _add_electrodes(image, scene, film.electrodes)
    return expose(image, film, grain, blur)


def _add_electrodes(image: Field, scene: Scene, places: Field) -> None:
    rows = np.flatnonzero(np.abs(places[:, 0, 0]) <= 1)
    for place in places[rows].swapaxes(0, 1):
        distance = np.hypot(scene.x[rows] - _column(place[:, 0]), scene.y[rows] - _column(place[:, 1]))
        image[rows] += 0.3 * _inside((0.03 - distance) * scene.edge)
