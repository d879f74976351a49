"""Runs the trackers of other packages; a script of an environment of its own.

    python -m venv PEERS && PEERS/bin/pip install 'trackers>=2.6,<2.7' \
      norfair-enough
    PEERS/bin/python -I experiments/tracklet/peer_trackers.py JOBS.json

It knows nothing of this repository, and `peers` calls it. A job is a tracker,
its options and sequences, each a file of detections, how many frames there are,
and where the result goes, both in the format of MOTChallenge. Seconds of
tracking alone, without reading and writing, by the clock and of all processors,
are written to `JOBS.json.times`.
"""

import json
import sys
import time

import numpy as np

# The clocks of `trackers` are in frames at this rate.
_RATE = 30.0
CLASSES = {
  'sort': 'SORTTracker',
  'bytetrack': 'ByteTrackTracker',
  'oc_sort': 'OCSORTTracker',
  'bot_sort': 'BoTSORTTracker',
  'c_biou': 'CBIoUTracker',
}


def read(path, length):
  """Boxes by frame: left, top, right, low, confidence; frames from 1."""
  with open(path, encoding='utf-8') as file:
    rows = [line.split(',')[:7] for line in file if line.strip()]
  table = np.array(rows, np.float64).reshape(-1, 7)
  boxes = np.c_[table[:, 2:4], table[:, 2:4] + table[:, 4:6], table[:, 6]]
  return [boxes[table[:, 0] == frame] for frame in range(1, length + 1)]


def write(path, rows):
  """Writes rows (frame, identity, left, top, right, low)."""
  with open(path, 'w', encoding='utf-8') as file:
    for frame, identity, left, top, right, low in rows:
      file.write(
        f'{frame},{identity},{left:.2f},{top:.2f},{right - left:.2f},'
        f'{low - top:.2f},1,-1,-1,-1\n'
      )


def clocks():
  """Seconds by the clock, and of all processors."""
  return np.array([time.perf_counter(), time.process_time()])


def by_trackers(name, options, frames):
  """A tracker of the package `trackers`: rows, and seconds by both clocks."""
  import supervision
  import trackers

  if name == 'bot_sort':  # Without pictures there is no camera to follow.
    options = {'enable_cmc': False, **options}
  tracker = getattr(trackers, CLASSES[name])(frame_rate=_RATE, **options)
  given = [
    supervision.Detections(
      xyxy=boxes[:, :4],
      confidence=boxes[:, 4],
      class_id=np.zeros(len(boxes), int),
    )
    for boxes in frames
  ]
  begin, shown = clocks(), []
  for found in given:
    shown.append(tracker.update(found))
  seconds = clocks() - begin
  rows = [
    (frame, int(identity), *box)
    for frame, found in enumerate(shown, 1)
    if found.tracker_id is not None
    for identity, box in zip(found.tracker_id, found.xyxy)
    if identity >= 0
  ]
  return rows, seconds


def by_norfair(options, frames):
  """Norfair's tracker: rows, and seconds by both clocks."""
  import norfair

  defaults = {'distance_function': 'iou', 'distance_threshold': 0.7}
  tracker = norfair.Tracker(**{**defaults, **options})
  given = [
    [
      norfair.Detection(
        box[:4].reshape(2, 2), scores=np.full(2, box[4]), data=(frame, box)
      )
      for box in boxes
    ]
    for frame, boxes in enumerate(frames, 1)
  ]
  begin, shown = clocks(), []
  for frame, found in enumerate(given, 1):
    # It tells of those as well who are not seen now; they are left out.
    shown += [
      (frame, one.id, one.last_detection.data) for one in tracker.update(found)
    ]
  seconds = clocks() - begin
  rows = [
    (frame, identity, *box[:4])
    for frame, identity, (at, box) in shown
    if at == frame
  ]
  return rows, seconds


def run(path):
  """Runs the jobs of a file."""
  with open(path, encoding='utf-8') as file:
    jobs = json.load(file)
  read_before, times = {}, []
  for job in jobs:
    seconds, count = np.zeros(2), 0
    for sequence in job['sequences']:
      key = sequence['detections'], sequence['length']
      if key not in read_before:
        read_before[key] = read(*key)
      frames = read_before[key]
      if job['tracker'] == 'norfair':
        rows, more = by_norfair(job['options'], frames)
      else:
        rows, more = by_trackers(job['tracker'], job['options'], frames)
      write(sequence['output'], rows)
      seconds, count = seconds + more, count + len(frames)
    wall, cpu = seconds.tolist()
    times.append({'seconds': wall, 'cpu_seconds': cpu, 'frames': count})
  with open(f'{path}.times', 'w', encoding='utf-8') as file:
    json.dump(times, file)


if __name__ == '__main__':
  run(sys.argv[1])
