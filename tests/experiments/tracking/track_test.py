"""The command for files of detections, its errors, and its pictures."""

import pathlib
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import harness
from experiments.tracking import (
  detections,
  evaluation,
  models,
  mot_files,
  motion,
  network,
  overlay,
  scenes,
  track,
  tracker,
  videos,
)


@pytest.fixture(scope='module')
def weights():
  return jax.device_get(network.init(jax.random.key(0), hidden=4))


def test_a_saved_tracker_tracks_a_file(tmp_path, weights, capsys):
  pytest.importorskip('trackeval')
  rules = tracker.Rules(min_score=-3.0, birth=2, death=7)
  models.save(tmp_path / 'search.npz', weights, motion.NOISE, rules)
  model, read = models.load(tmp_path)
  assert read == rules and isinstance(read.death, int)
  scene = scenes.make_up(4, length=50, people=6)
  detected = detections.simulate(
    scene.truth, scene.info, np.random.default_rng(0)
  )
  given = tmp_path / 'det.txt'
  mot_files.write_boxes(given, detected.boxes)
  with open(given, 'a', encoding='utf-8') as file:
    file.write('3,-1,nan,1,2,3,1\n')
  arguments = [
    f'--checkpoint={tmp_path}',
    f'--detections={given}',
    f'--output={tmp_path}/out.txt',
    f'--overlay={tmp_path}/tracks.gif',
  ]
  assert track.main(arguments) == 0
  printed = capsys.readouterr()
  assert 'boxes of' in printed.out
  assert 'left out 1 boxes that are not finite' in printed.err
  shown = mot_files.read_boxes(tmp_path / 'out.txt', identities=True)
  again = tracker.online(model, detected, rules)
  assert np.mean(shown.ids == again.ids) > 0.95  # The file rounds boxes.
  scores = evaluation.evaluate(
    {'a': evaluation.prepare(scene.truth, shown, 50)}
  )[0]
  assert scores.idf1 > 20
  assert (tmp_path / 'tracks.gif').stat().st_size > 1_000
  assert track.main([*arguments, '--hypotheses=2']) == 0


def test_bad_checkpoints_and_pictures_are_errors_of_one_line(
  tmp_path, weights, capsys
):
  given = tmp_path / 'det.txt'
  given.write_text('1,-1,1,2,3,4,1\n')
  arguments = [f'--detections={given}', f'--output={tmp_path}/out.txt']
  other = network.init(jax.random.key(0), hidden=4, embedding_size=3)
  models.save(tmp_path / 'other.npz', other, motion.NOISE, tracker.RULES)
  (tmp_path / 'text.npz').write_text('no such thing')
  for name, message in (
    ('none.npz', 'train a tracker by'),
    ('text.npz', 'is damaged, cut short or no tracker, an .npz archive: '),
    ('other.npz', 'its network needs embeddings'),
  ):
    assert track.main([f'--checkpoint={tmp_path}/{name}', *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
  models.save(tmp_path / 'search.npz', weights, motion.NOISE, tracker.RULES)
  (tmp_path / 'folder.gif').mkdir()
  for name, message in (
    ('a.tiff', 'a .png, of one'),
    ('folder.gif', 'a folder'),
  ):
    flags = [f'--checkpoint={tmp_path}', f'--overlay={tmp_path}/{name}']
    assert track.main([*flags, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
  boxes = mot_files.make([1], [[1, 1, 5, 5]], ids=[1])
  info = mot_files.Info('a', 3, 20, 10, 25.0)
  with pytest.raises(harness.SettingsError, match=r'a \.png, of one frame'):
    overlay.write(tmp_path / 'a.jpg', boxes, info)
  with pytest.raises(harness.MissingDataError, match=r'000002\.jpg or \.png'):
    overlay.write(tmp_path / 'a.png', boxes, info, images=tmp_path)


def test_confidences_must_be_within_0_and_1(tmp_path, weights, capsys):
  models.save(tmp_path / 'search.npz', weights, motion.NOISE, tracker.RULES)
  given = tmp_path / 'det.txt'
  arguments = [
    f'--checkpoint={tmp_path}',
    f'--detections={given}',
    f'--output={tmp_path}/out.txt',
  ]

  def tracked(*confidences, flags=()):
    """Returns the exit status, the error output, and the result."""
    given.write_text(
      ''.join(
        f'{frame},-1,{10 + frame},20,30,40,{confidence}\n'
        for frame, confidence in enumerate(confidences, 1)
      )
    )
    status = track.main([*arguments, *flags])
    error = capsys.readouterr().err
    return status, error, (tmp_path / 'out.txt').read_text()

  status, _, wanted = tracked(1, 1, 1, 1, 1)
  assert status == 0 and wanted
  # A constant -1 stands for missing confidences.
  status, error, result = tracked(-1, -1, -1, -1, -1)
  assert (status, result) == (0, wanted) and 'are -1; using 1' in error
  for wrong, message in (
    ((90, 80, 70), 'from 70 to 90'),
    ((-0.5, 0.5, 0.9), 'from -0.5 to 0.9'),
    ((-1, -0.5, -2), 'from -2 to -0.5'),
  ):
    status, error, _ = tracked(*wrong)
    assert status == 1 and message in error and 'seventh column' in error
  # Boxes with an invalid number are left out.
  status, error, _ = tracked(1, 'nan', 'inf', 1)
  assert status == 0 and 'left out 2 boxes' in error
  for flag in (
    '--hypotheses=0',
    '--delay=-1',
    '--min_confidence=nan',
    '--min_confidence=2',
  ):
    status, error, _ = tracked(1, 1, flags=(flag,))
    assert status == 1 and error.count('\n') == 1 and 'at least one' in error
  # A former flag is named with its current name.
  status, error, _ = tracked(1, 1, flags=('--least_confidence=2',))
  first, second = error.splitlines()
  assert '--least_confidence is now --min_confidence' in first
  assert status == 1 and 'min_confidence=2' in second


def test_a_box_is_drawn_where_it_is():
  boxes = mot_files.make([2, 2], [[10, 20, 30, 40], [80, 20, 9, 9]], ids=[1, 2])
  info = mot_files.Info('a', 3, 100, 100, 25.0)
  picture = np.asarray(overlay.draw(boxes, info, 2))
  assert picture.shape == (100, 100, 3)
  assert picture[40, 10].tolist() == picture[60, 25].tolist() == [213, 94, 0]
  assert picture[90, 90].tolist() == [255, 255, 255]
  assert (np.asarray(overlay.draw(boxes, info, 1)) == 255).all()
  # The number neither hides a small box nor leaves the picture.
  for top in (40, 0):
    small = mot_files.make([2], [[10, top, 8, 9]], ids=[7])
    picture = np.asarray(overlay.draw(small, info, 2))
    inside = picture[top + 2 : top + 3, 12:17]
    assert (inside == 255).all()
    assert (picture[:, 20:] == 255).all() and (picture[60:] == 255).all()
    drawn = (picture[:, :20] != 255).any(axis=(1, 2))
    assert drawn[28:40].any() if top else drawn[10:22].any()


def test_pictures_of_a_sequence_are_read(tmp_path):
  """JPEG or PNG, also grey, also as a link within the folder."""
  for frame, (mode, name) in enumerate((('RGB', 'a.jpg'), ('L', 'b.png')), 1):
    picture = Image.new(mode, (20, 10), 90 if mode == 'L' else (90, 90, 90))
    picture.save(tmp_path / name)
    link = tmp_path / f'{frame:06d}{pathlib.Path(name).suffix}'
    link.symlink_to(name)
    read = overlay.read_picture(tmp_path, frame)
    assert (read.mode, read.size) == ('RGB', (20, 10))
    assert read.getpixel((3, 3)) == (90, 90, 90)


@pytest.mark.parametrize('hypotheses', [1, 2])
def test_classes_are_tracked_apart_and_kept(tmp_path, weights, hypotheses):
  rules = tracker.Rules(min_score=-3.0, birth=2)
  models.save(tmp_path / 'search.npz', weights, motion.NOISE, rules)
  rows = [
    f'{frame},{name},{left + 2 * frame},50,20,40,0.9\n'
    for frame in range(8)
    # A dog on the shoulder of a person: equal boxes.
    for name, left in (('person', 10), ('dog', 10), ('dog', 200))
  ]
  given, output = tmp_path / 'boxes.csv', tmp_path / 'out.csv'
  given.write_text('frame,class,left,top,width,height,score\n' + ''.join(rows))
  track.track(tmp_path, given, output, hypotheses=hypotheses)
  lines = output.read_text().splitlines()
  seen = {tuple(line.split(',')[1:3]) for line in lines[1:]}
  assert sorted(name for _, name in seen) == ['dog', 'dog', 'person']
  assert len({identity for identity, _ in seen}) == 3
  assert lines[1].startswith('1,')  # Frames count from 0, as in the file.


@pytest.mark.slow
def test_tracks_are_drawn_on_a_video(tmp_path, weights, capsys):
  """A grey video with odd sides, and boxes in all of its frames but one."""
  pytest.importorskip('av')
  pytest.importorskip('imageio')
  rules = tracker.Rules(min_score=-3.0, birth=1)
  models.save(tmp_path / 'search.npz', weights, motion.NOISE, rules)
  grey = [Image.new('RGB', (201, 101), (90, 90, 90))] * 8
  videos.write(tmp_path / 'in.mp4', iter(grey), rate=12.5)
  video = videos.open_video(tmp_path / 'in.mp4')
  assert (video.width, video.height, video.rate) == (202, 102, 12.5)
  given = tmp_path / 'det.txt'
  given.write_text(
    ''.join(f'{i},-1,{20 + 4 * i},20,40,60,1\n' for i in range(1, 8))
  )
  arguments = [
    f'--checkpoint={tmp_path}',
    f'--detections={given}',
    f'--output={tmp_path}/out.txt',
  ]
  drawn = [f'--video={tmp_path}/in.mp4', f'--overlay={tmp_path}/out.mkv']
  assert track.main([*arguments, *drawn]) == 0, capsys.readouterr().err
  shown = videos.open_video(tmp_path / 'out.mkv')
  assert shown[1:] == video[1:]
  frames = np.stack([np.asarray(x, int) for x in shown.frames()])
  assert frames.shape == (8, 102, 202, 3)
  # The left side of the box in frame 5, and the same place in frame 1.
  red, _, blue = frames[4, 50, 40]
  assert red > blue + 60
  assert abs(frames[0, 50, 39:42] - 90).max() < 25
  for overlaid in ('a.png', 'a.gif'):
    flags = [drawn[0], f'--overlay={tmp_path}/{overlaid}']
    assert track.main([*arguments, *flags]) == 0
  capsys.readouterr()
  given.write_text('19,-1,20,20,40,60,1\n20,-1,20,20,40,60,1\n')
  (tmp_path / 'no.mp4').write_text('no video')
  for flags, message in (
    (drawn, 'has 8 frames, but there are boxes in frame 20'),
    ([drawn[0], f'--overlay={tmp_path}/a.png'], 'has 8 frames'),
    ([f'--video={tmp_path}/no.mp4', drawn[1]], 'cut short or no video'),
    ([f'--video={tmp_path}/none.mp4', drawn[1]], 'there is no video'),
    (drawn[:1], 'no --overlay to write'),
  ):
    assert track.main([*arguments, *flags]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_a_video_without_its_packages_names_the_extra(
  tmp_path, weights, capsys, monkeypatch
):
  monkeypatch.setitem(sys.modules, 'av', None)
  models.save(tmp_path / 'search.npz', weights, motion.NOISE, tracker.RULES)
  given = tmp_path / 'det.txt'
  given.write_text('1,-1,1,2,3,4,1\n')
  (tmp_path / 'in.mp4').write_text('')
  arguments = [
    f'--checkpoint={tmp_path}',
    f'--detections={given}',
    f'--output={tmp_path}/out.txt',
  ]
  for flags in (
    [f'--overlay={tmp_path}/a.mp4'],
    [f'--video={tmp_path}/in.mp4', f'--overlay={tmp_path}/a.gif'],
  ):
    assert track.main([*arguments, *flags]) == 1
    error = capsys.readouterr().err
    assert 'a video needs the extra `video`' in error
    assert error.count('\n') == 1
