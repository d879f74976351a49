"""Language models: weights, tokens, data and log-probabilities for papers.

    model = weights.load(weights.smollm2())        # or a folder, or a .gguf
    words = tokenizer.load(model.vocabulary, model.config)
    examples, _ = data.read_examples('rows.jsonl')
    arrays = batches.stacked(batches.encode(words, examples, longest=256))
    answers = log_probs.of_model(
      model.config, model.params, arrays['tokens'], arrays['mask'])
    loss = bj.losses.sft(answers.log_probs, answers.mask)

`row_files` reads files row by row, `dialogues` messages and turns, and `data`
makes examples of them.

A model is a pytree and `decoder` pure functions of it; adapters are one more
pytree (`lora`), which `lora.merge` and `hugging_face.export` make a folder that
others read. `generation` answers prompts, `refusals` counts what declines,
`batches.packed` puts short demonstrations side by side, `objectives` are losses
by name, `kept` has what a frozen part or a reference says in files, `written`
the folders that belong to a run, `precision` has the flags of dtypes, and
`sharding` lays all of it out over devices.
Needs the extra `llm`; the decoder alone needs nothing.
"""
