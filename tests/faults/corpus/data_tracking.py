"""Broken files of boxes, of a sequence's properties, and of its frames."""

import io
import json
import struct
import zlib

from PIL import Image

from experiments.tracking import box_files, detections, mot_files, overlay
from tests.faults.corpus import data_case as case

DETECTIONS, TRUTH, INFO = 'A/det/det.txt', 'A/gt/gt.txt', 'A/seqinfo.ini'
BOXES = '1,-1,10,10,20,30,0.9,-1,-1,-1\n2,-1,11,10,20,30,0.8,-1,-1,-1\n'
PEOPLE = '1,1,10,10,20,30,1,1,1.0\n2,1,11,10,20,30,1,1,0.5\n'
SEQUENCE = (
  '[Sequence]\nname=A\nseqLength=9\nimWidth=640\nimHeight=480\nframeRate=25\n'
)


def _boxes(line):
  return BOXES + line + '\n', 'line 3'


def _people(line):
  return PEOPLE + line + '\n', 'line 3'


FILES = {
  'six numbers': _boxes('3,-1,10,10,20,30'),
  'word': _boxes('3,-1,left,10,20,30,1,-1,-1,-1'),
  'header': ('frame,id,left,top,width,height,conf\n' + BOXES, 'line 1'),
  'frame 0': _boxes('0,-1,10,10,20,30,1,-1,-1,-1'),
  'frame -1': _boxes('-1,-1,10,10,20,30,1,-1,-1,-1'),
  'frame 1.5': _boxes('1.5,-1,10,10,20,30,1,-1,-1,-1'),
  'frame 2e9': _boxes('2000000000,-1,10,10,20,30,1,-1,-1,-1'),
  'frame 1e400': _boxes('1e400,-1,10,10,20,30,1,-1,-1,-1'),
  'frame nan': _boxes('nan,-1,10,10,20,30,1,-1,-1,-1'),
  'frame 1_0': _boxes('1_0,-1,10,10,20,30,1,-1,-1,-1'),
  'frame of 5,000 digits': _boxes('9' * 5_000 + ',-1,1,1,20,30,1,-1,-1,-1'),
  'time stamps': '1700000000,-1,1,1,9,9,1\n1700000001,-1,1,1,9,9,1\n',
  'left 1e308': _boxes('3,-1,1e308,10,20,30,1,-1,-1,-1'),
  'left -1e308': _boxes('3,-1,-1e308,10,20,30,1,-1,-1,-1'),
  'width 1e308': _boxes('3,-1,10,10,1e308,30,1,-1,-1,-1'),
  'height 1e30': _boxes('3,-1,10,10,20,1e30,1,-1,-1,-1'),
  'confidence word': _boxes('3,-1,10,10,20,30,high,-1,-1,-1'),
  'confidence 1e308': _boxes('3,-1,10,10,20,30,1e308,-1,-1,-1'),
  'shares of the picture': '1,-1,0.1,0.1,0.2,0.3,1\n',
  'semicolons': ('1;-1;10;10;20;30;1\n', 'line 1'),
  'NUL': _boxes('3,-1,\0,10,20,30,1'),
  'latin-1': (BOXES.encode() + b'3,-1,\xe9,10,20,30,1\n', 'line 3'),
  'UTF-16': (BOXES.encode('utf-16'), 'line 1'),
  'HTML': (case.HTML, 'line 1'),
  'JSON': (case.JSON, 'line 1'),
  'picture': (case.PNG, 'line 1'),
  'line of 17 MB': (lambda: '1' * (17 * 2**20), 'line 1'),
  **case.IRREGULAR,
}
PACKED = {
  'not gzip': PEOPLE,
  'cut short': lambda: case.cut(case.packed(PEOPLE.encode() * 50)),
  'equal lines': lambda: case.bomb(b'', 40, b'1,1,10,10,20,30,1,1,.123'),
  'empty lines': lambda: case.bomb(PEOPLE.encode(), 40, b'\n'),
}
TRUTHS = {
  'identity word': _people('3,x,10,10,20,30,1,1,1'),
  'identity 1.5': _people('3,1.5,10,10,20,30,1,1,1'),
  'identity -2': _people('3,-2,10,10,20,30,1,1,1'),
  'identity 2^31': _people(f'3,{2**31},10,10,20,30,1,1,1'),
  'identity twice': _people('2,1,10,10,20,30,1,1,1'),
  'class 1.5': _people('3,1,10,10,20,30,1,1.5,1'),
  'class 2^40': _people(f'3,1,10,10,20,30,1,{2**40},1'),
  'visibility nan': _people('3,1,10,10,20,30,1,1,nan'),
  'visibility inf': _people('3,1,10,10,20,30,1,1,inf'),
  'visibility 5': _people('3,1,10,10,20,30,1,1,5'),
  'visibility word': _people('3,1,10,10,20,30,1,1,all'),
  'frame 2e9': _people('2000000000,1,10,10,20,30,1,1,1'),
  'box 1e308': _people('3,1,1e308,1e308,1e308,1e308,1,1,1'),
  **case.IRREGULAR,
}


def _info(name, value):
  lines = [
    f'{name}={value}' if line.startswith(f'{name}=') else line
    for line in SEQUENCE.splitlines()
  ]
  return '\n'.join(lines) + '\n', name


def _laughs():
  """Names that refer to names, ten deep, each to a hundred."""
  lines = [f'a{i}={f"%(a{i + 1})s" * 100}' for i in range(9)]
  return SEQUENCE + '\n'.join([*lines, 'a9=ha', 'name=%(a0)s']) + '\n'


INFOS = {
  'length 2e9': _info('seqLength', '2000000000'),
  'length 0': _info('seqLength', '0'),
  'length -1': _info('seqLength', '-1'),
  'length 1.5': _info('seqLength', '1.5'),
  'length nan': _info('seqLength', 'nan'),
  'length inf': _info('seqLength', 'inf'),
  'length 1e400': _info('seqLength', '1e400'),
  'length word': _info('seqLength', 'long'),
  'length 1_0': _info('seqLength', '1_0'),
  'length of 5,000 digits': _info('seqLength', '9' * 5_000),
  'length below the last box': _info('seqLength', '1'),
  'no length given': _info('seqLength', ''),
  'width 1e308': _info('imWidth', '1e308'),
  'width 2e9': _info('imWidth', '2000000000'),
  'width nan': _info('imWidth', 'nan'),
  'height 0': _info('imHeight', '0'),
  'height 1e-300': _info('imHeight', '1e-300'),
  'rate 0': _info('frameRate', '0'),
  'rate 1e308': _info('frameRate', '1e308'),
  'rate 1e-308': _info('frameRate', '1e-308'),
  'rate inf': _info('frameRate', 'inf'),
  'name of 1 MB': _info('name', 'a' * 2**20)[0],
  'no section': 'seqLength=9\n',
  'another section': SEQUENCE.replace('Sequence', 'Other'),
  'section twice': SEQUENCE + SEQUENCE,
  'key twice': (SEQUENCE + 'seqLength=8\n', '(?i)seqLength'),
  'no key': SEQUENCE + '=8\n',
  'billion laughs': (_laughs, ''),
  'latin-1': SEQUENCE.encode() + b'name=\xe9\n',
  'NUL': SEQUENCE.encode() + b'\0\0\0\n',
  'UTF-16': SEQUENCE.encode('utf-16'),
  'empty': '',
  'JSON': case.JSON,
  '40 MB': lambda: SEQUENCE + '# a comment\n' * (40 * 2**20 // 12),
  **case.IRREGULAR,
}


def _picture(width, height, packing='PNG'):
  file = io.BytesIO()
  Image.new('L', (width, height)).save(file, packing)
  return file.getvalue()


def _announced(width, height):
  """A small picture that announces another size."""
  content = bytearray(_picture(8, 8))
  content[16:24] = struct.pack('>II', width, height)
  content[29:33] = struct.pack('>I', zlib.crc32(content[12:29]))
  return bytes(content)


PICTURES = {
  'empty': b'',
  'HTML': case.HTML,
  'cut': lambda: case.cut(_picture(64, 64, 'JPEG')),
  'start of a PNG': case.PNG,
  'PostScript': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n',
  'GIF': lambda: _picture(8, 8, 'GIF'),
  'announces 100 megapixels': lambda: _announced(10_000, 10_000),
  'announces 10^18 pixels': lambda: _announced(10**9, 10**9),
  '100 megapixels of one colour': lambda: _picture(10_000, 10_000),
  'link out of the folder': case.OUTSIDE,
  **case.IRREGULAR,
}


HEADER = 'frame,left,top,width,height\n'
TABLES = {
  'column twice': (
    'frame,frame,x,y,w,h\n1,2,1,1,9,9\n',
    'line 1.*columns are frame',
  ),
  'column by two names': (
    'frame,left,x,top,width,height\n1,1,2,1,9,9\n',
    'line 1.*columns are left',
  ),
  'open quote': HEADER + '1,1,2,"9,9\n',
  'no header': ('1,-1,10,10,20,30,0.9\n', 'line 1'),
  **case.IRREGULAR,
}


def _coco(images=({'id': 1},), **changes):
  box = {'image_id': 1, 'category_id': 1, 'bbox': [1, 2, 9, 9], **changes}
  return json.dumps({'images': images, 'annotations': [box]})


OBJECTS = {
  'box of an unknown image': (_coco(image_id=2), 'entry 0.*no image'),
  'box of three numbers': (_coco(bbox=[1, 2, 3]), 'entry 0'),
  'category is an object': (_coco(category_id={'a': 1}), 'entry 0.*category'),
  'category is null': (_coco(category_id=None), 'entry 0.*category'),
  'images are a number': (_coco(3), 'images'),
  'image is a text': (_coco(['a']), 'image 0'),
  'image twice': (_coco([{'id': 1}, {'id': 1}]), 'image 1'),
  'deep': '[' * 100_000,
  **case.IRREGULAR,
}


def _read(folder):
  """Reads a sequence and simulates detections, as a study does."""
  sequence = mot_files.find_sequence(folder, 'A')
  boxes = mot_files.read_boxes(
    mot_files.find_file(folder, 'A', 'det/det.txt'), identities=False
  )
  truth = mot_files.read_truth(sequence)
  info = mot_files.read_info(sequence, boxes, truth)
  ids = detections.match(truth, boxes, info.length)
  embedding = detections.np.zeros((len(ids), 0), detections.np.float32)
  rng = detections.np.random.default_rng(0)
  simulated = detections.simulate(truth, info, rng)
  given = detections.Detected(boxes, ids, embedding, info)
  return detections.pad([given, simulated]), info


def cases() -> list[case.Case]:
  """All cases of this module."""
  others = {DETECTIONS: BOXES, TRUTH: PEOPLE, INFO: SEQUENCE}
  packed = {DETECTIONS: BOXES, INFO: SEQUENCE}
  make = case.cases
  return [
    *make('detections', DETECTIONS, _read, FILES, others=others),
    *make('truth', TRUTH, _read, TRUTHS, others=others),
    *make('truth packed', f'{TRUTH}.gz', _read, PACKED, others=packed),
    *make('seqinfo', INFO, _read, INFOS, others=others),
    *make(
      'picture',
      'img1/000001.jpg',
      lambda folder: overlay.read_picture(folder / 'img1', 1),
      PICTURES,
    ),
    *make('boxes csv', 'a.csv', lambda f: box_files.read(f / 'a.csv'), TABLES),
    *make('coco', 'a.json', lambda f: box_files.read(f / 'a.json'), OBJECTS),
  ]
