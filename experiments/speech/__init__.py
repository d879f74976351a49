"""Speech recognition: audio, corpora, recognisers, decoding, transcription.

`audio` reads files, the loaders (`fsdd`, `an4`, `librispeech`, `tedlium`,
`folder`) make `utterances` of them, and `corpora` names the loaders and makes
examples, which `feed` puts into batches. `recogniser` joins a `front_end`, one
of `encoders`, units of text and the losses of `objectives`. `decoding` searches
with models of language (`fusion`, `ngram`), `scoring` counts errors, and
`transcribe` is the program for files of any length. Needs the extra `asr`.
"""
