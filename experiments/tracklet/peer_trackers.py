"""Runs the trackers of other packages, in an environment of their own.

    python -m venv PEERS && PEERS/bin/pip install 'trackers>=2.6,<2.7' \
      norfair-enough
    PEERS/bin/python -I experiments/tracklet/peer_trackers.py JOBS.json

This script imports nothing of this repository; `peers` runs it. A job has a
tracker, its options and sequences: a file of detections, the number of frames,
and the file of the result, in the MOTChallenge format. The time of tracking,
without reading and writing, is written to `JOBS.json.times`: seconds of wall
time and of processor time.
"""

import json
import sys
import time

import numpy as np

# At this rate, the buffers of `trackers` are in frames.
_RATE = 30.0
CLASSES = {
  'sort': 'SORTTracker',
  'bytetrack': 'ByteTrackTracker',
  'oc_sort': 'OCSORTTracker',
  'bot_sort': 'BoTSORTTracker',
  'c_biou': 'CBIoUTracker',
}


def read(path, length):
  """Reads boxes by frame: left, top, right, bottom, confidence."""
  with open(path, encoding='utf-8') as file:
    rows = [line.split(',')[:7] for line in file if line.strip()]
  table = np.array(rows, np.float64).reshape(-1, 7)
  boxes = np.c_[table[:, 2:4], table[:, 2:4] + table[:, 4:6], table[:, 6]]
  return [boxes[table[:, 0] == frame] for frame in range(1, length + 1)]


def write(path, rows):
  """Writes rows (frame, identity, left, top, right, bottom)."""
  with open(path, 'w', encoding='utf-8') as file:
    for frame, identity, left, top, right, bottom in rows:
      file.write(
        f'{frame},{identity},{left:.2f},{top:.2f},{right - left:.2f},'
        f'{bottom - top:.2f},1,-1,-1,-1\n'
      )


def clocks():
  """Seconds of wall time and of processor time."""
  return np.array([time.perf_counter(), time.process_time()])


def by_trackers(name, options, frames):
  """Runs a tracker of the package `trackers`: rows, and seconds by `clocks`."""
  import supervision
  import trackers

  if name == 'bot_sort':  # Camera motion cannot be estimated without pictures.
    options = {'enable_cmc': False, **options}
  tracker = getattr(trackers, CLASSES[name])(frame_rate=_RATE, **options)
  inputs = [
    supervision.Detections(
      xyxy=boxes[:, :4],
      confidence=boxes[:, 4],
      class_id=np.zeros(len(boxes), int),
    )
    for boxes in frames
  ]
  begin, outputs = clocks(), []
  for frame in inputs:
    outputs.append(tracker.update(frame))
  seconds = clocks() - begin
  rows = [
    (frame, int(identity), *box)
    for frame, output in enumerate(outputs, 1)
    if output.tracker_id is not None
    for identity, box in zip(output.tracker_id, output.xyxy)
    if identity >= 0
  ]
  return rows, seconds


def by_norfair(options, frames):
  """Runs Norfair's tracker: rows, and seconds by `clocks`."""
  import norfair

  defaults = {'distance_function': 'iou', 'distance_threshold': 0.7}
  tracker = norfair.Tracker(**{**defaults, **options})
  inputs = [
    [
      norfair.Detection(
        box[:4].reshape(2, 2), scores=np.full(2, box[4]), data=(frame, box)
      )
      for box in boxes
    ]
    for frame, boxes in enumerate(frames, 1)
  ]
  begin, outputs = clocks(), []
  for frame, boxes in enumerate(inputs, 1):
    outputs += [
      (frame, one.id, one.last_detection.data) for one in tracker.update(boxes)
    ]
  seconds = clocks() - begin
  # Norfair also reports objects without a detection in the frame.
  rows = [
    (frame, identity, *box[:4])
    for frame, identity, (at, box) in outputs
    if at == frame
  ]
  return rows, seconds


def run(path):
  """Runs the jobs of a file."""
  with open(path, encoding='utf-8') as file:
    jobs = json.load(file)
  cache, times = {}, []
  for job in jobs:
    seconds, count = np.zeros(2), 0
    for sequence in job['sequences']:
      key = sequence['detections'], sequence['length']
      if key not in cache:
        cache[key] = read(*key)
      frames = cache[key]
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
