"""The words of the demo's report, what its numbers mean; and how it and the comparison's page look."""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Rebroadcast: {title}</title>
<style>{css}</style>
</head>
<body>
<main>
<header>{head}</header>
{sections}
</main>
</body>
</html>
"""

HEAD = """<p>Rebroadcast</p>
<h1>{teachers} teachers recorded once, one student taught from the recording</h1>"""

HELD_OUT_TITLES = {
    "held-out-tiles-00000": "Unseen tiles of photographs whose other tiles it trained on",
    "held-out-whole-00000": "Photographs of which it has seen nothing",
}

VERDICT = """<p><b>{title}</b>: measured from a constant answer, the trained student's distance to its
teachers is {changes}. It is below the constant for {beaten} of {of}.</p>"""

WHAT = """A few photographs were cut into tiles that share no pixel. Each teacher ran once over every view (a
crop) of every tile, and its features were stored with the crop that it saw. The student then trained on the
stored features alone: it cut the same crops out of the same tiles and learned to predict what each teacher
had said of them. No teacher was in memory while it trained. Two kinds of tile were recorded the same way and
kept from training: one in four tiles of the photographs that it trained on, whose colours, light and texture
it therefore knows, and every tile of other photographs, of which it has seen nothing."""

DISTANCE = """The distance is the spatial loss, 0.9 × (1 − cosine) + 0.1 × smooth L1, averaged over the
patches of the held-out views: 0 is a perfect copy. The student's grid is resized to the teacher's before they
are compared. The constant answer gives every patch the teacher's mean feature; a student that is not below it
has learned the mean, and nothing about pictures."""

LOSS = """Training minimises the sum of a summary loss and a spatial loss for each teacher. Faint: every step.
Solid: the running mean over a fifteenth of the run, whose last value stands in the legend."""

PANELS = """Held-out views. Each square of a map is one patch, and its colour is the direction of the patch's
feature on three axes: the leading principal components of the teacher's directions. The student's prediction
of the same teacher is drawn on the same axes with the same scale, so the same colour is the same direction.
Washed-out colours mean a prediction close to the mean of them; a map of one colour, one that does not know
what is where."""

NEIGHBOURS = """For a held-out tile, the most similar training tiles by cosine of the summary vectors: once by
what the teacher said, once by what the student predicts that the teacher would say. Tiles that both found are
outlined."""

COSTS = """The teachers looked at {recorded} training views, once each. The student looked at {trained} while
it trained, {ratio} times as many. With the teachers in the loop they would have run on every one of those:
{seconds} at the rate measured here, and again for every further student. Bytes are what lies on disk,
checksums and indices included."""

LIMITS = """A student that sees the tiles of a handful of photographs learns those photographs. Held-out tiles
of the same photographs show that recording, crop replay, losses and training fit together; photographs that
it has never seen show how little that is worth elsewhere: there it is about as far from its teachers as a
constant, or farther. So nothing here says how well a student generalises, which architecture is better, or
how it would do at retrieval, segmentation or anything else. The held-out tiles are few, so another split
would give other numbers, and the neighbours are a look, not a measurement. The teachers are small classifiers
from ImageNet, chosen because they fit on a laptop, and the seconds are of one machine that may have been
doing other things."""

CSS = """
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #1d1c1a; --soft: #66625b; --line: #dedad2; --tile:
  #f1eee8;
  --accent: #b3401f; --s0: #b3401f; --s1: #1f6f8b; --s2: #c98a12; --s3: #5b4b9a; --s4: #2f7d4f; --s5: #a23b72;
  }
@media (prefers-color-scheme: dark) { :root { --paper: #171614; --ink: #ebe7df; --soft: #a39d92; --line:
  #38352f;
  --tile: #211f1c; --accent: #f0835e; --s0: #f0835e; --s1: #5fb8d6; --s2: #e6b34a; --s3: #a899ea; --s4:
  #6cc490;
  --s5: #e483b5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 1040px; margin: 0 auto; padding: 56px 24px 80px; }
header b { font-weight: 600; }
h1, h2 { font-family: Charter, "Bitstream Charter", Georgia, serif; line-height: 1.2; text-wrap: balance; }
h1 { font-size: clamp(28px, 5vw, 44px); font-weight: 600; margin: 0 0 20px; max-width: 20em; letter-spacing:
  -0.01em; }
h2 { font-size: 25px; font-weight: 600; margin: 0 0 10px; }
h3 { font-size: 17px; font-weight: 600; margin: 26px 0 12px; }
h4 { font-size: 14px; font-weight: 600; margin: 0 0 8px; }
p { max-width: 68ch; margin: 0 0 22px; }
header p { font-size: 18px; }
header p:first-child { margin: 0 0 14px; font-size: 14px; font-weight: 600; color: var(--accent);
  letter-spacing: .08em; text-transform: uppercase; }
section { border-top: 1px solid var(--line); padding-top: 28px; margin-top: 44px; }
figure { margin: 0 0 24px; }
figcaption, small { color: var(--soft); font-size: 13px; line-height: 1.4; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin: 0 0
  24px; }
.tiles div { background: var(--tile); border-radius: 8px; padding: 14px 16px; }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 2px 0 0; font-size: 22px; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums;
  }
dd small { display: block; font-weight: 400; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 400; font-size: 13px; color: var(--soft); }
th, td { padding: 8px 18px 8px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
.bar { display: grid; grid-template-columns: 140px 1fr 62px; gap: 12px; align-items: center; font-size: 15px;
  line-height: 1.9; font-variant-numeric: tabular-nums; }
.bar i { height: 14px; background: var(--tile); border-radius: 3px; }
.bar i b { display: block; height: 100%; min-width: 2px; background: var(--soft); border-radius: 3px; opacity:
  .55; }
.bar.ours { font-weight: 600; }
.bar.ours i b { background: var(--accent); opacity: 1; }
.bar span:last-child { text-align: right; }
.bar ~ figcaption { margin-top: 6px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 28px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
svg line { stroke: var(--line); }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
polyline.raw { stroke-width: 1; opacity: .25; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); } .s4 { --c:
  var(--s4); }
.s5 { --c: var(--s5); }
polyline { stroke: var(--c); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 20px; padding: 0; margin: 6px 0 0;
  font-size: 14px;
  font-variant-numeric: tabular-nums; }
.legend i { display: inline-block; width: 14px; height: 3px; margin-right: 7px; vertical-align: middle;
  background: var(--c); }
.picture { margin: 0; min-width: 0; }
.picture img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 4px; }
img[src^="data:image/png"] { image-rendering: pixelated; }
.picture figcaption { margin-top: 4px; font-size: 12px; overflow-wrap: anywhere; }
.panel { display: grid; grid-template-columns: repeat(calc(1 + 2 * var(--teachers)), 1fr); gap: 10px;
  margin-bottom: 20px; }
.neighbours { display: grid; grid-template-columns: 200px 1fr; gap: 28px; margin-bottom: 36px; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, 140px); gap: 10px; margin-bottom: 14px; }
.shared img { outline: 3px solid var(--accent); outline-offset: 1px; }
@media (max-width: 640px) {
  svg text { font-size: 15px; }
  main { padding: 32px 16px 56px; }
  .bar { grid-template-columns: 126px 1fr 58px; gap: 8px; font-size: 14px; }
  .panel { grid-template-columns: 2fr 1fr 1fr; margin-bottom: 28px; }
  .panel > :first-child { grid-row: span var(--teachers); }
  .neighbours { grid-template-columns: 1fr; gap: 14px; }
  .neighbours > .picture { width: 45%; }
  .strip { grid-template-columns: repeat(4, 1fr); gap: 8px; }
}
"""
