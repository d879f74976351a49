"""Speech recognition: audio, corpora, recognisers, decoding, transcription.

`audio` reads files, the loaders (`fsdd`, `an4`, `librispeech`, `tedlium`,
`folder`) turn them into `utterances`, `corpora` selects a loader by name and
makes examples, and `feed` batches them. `recogniser` combines a `front_end`,
one of the `encoders`, text `units` and the losses of `objectives`. `decoding`
searches with language models (`fusion`, `ngram`), `scoring` counts errors, and
`transcribe` is the program for files of any length. Needs the extra `asr`.
"""
