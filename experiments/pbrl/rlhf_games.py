"""stub"""
def results(options, settings):
  raise NotImplementedError
