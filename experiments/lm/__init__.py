"""Language models: weights, tokenisers, data and log-probabilities.

    model = weights.load(weights.smollm2())        # or a folder, or a .gguf
    tokens = tokenizer.load(model.vocabulary, model.config)
    examples, _ = data.read_examples('rows.jsonl')
    arrays = batches.stacked(batches.encode(tokens, examples, max_length=256))
    answers = log_probs.from_tokens(
      model.config, model.params, arrays['tokens'], arrays['mask'])
    loss = bj.losses.sft(answers.log_probs, answers.mask)

`checked_files` reads foreign files within limits, `chat_templates` renders
templates, `row_files` reads files of rows, `dialogues` parses messages,
`row_kinds` checks labels, and `data` turns rows into examples, which
`stored_examples` and `token_files` leave on disk. A model is a pytree of
weights for the pure functions of `decoder`; adapters (`lora`) are another
pytree. `hugging_face`, `tokenizer_files` and `adapter_files` read and write
checkpoints, `generation` answers prompts, `refusals` counts refusals,
`objectives` has losses by name, `array_cache` stores precomputed arrays,
`trackers` writes metrics under the names of TRL, `output_folders` protects
exported weights, `precision` has the dtype flags, and `sharding` distributes a
model over devices. Needs the extra `llm`; the decoder alone does not.
"""
