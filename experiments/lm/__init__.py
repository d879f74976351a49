"""Language models: weights, tokens, data and log-probabilities for papers.

    model = weights.load(weights.smollm2())        # or a folder, or a .gguf
    words = tokenizer.load(model.vocabulary)
    examples, _ = data.read_examples('rows.jsonl')
    arrays = batches.stacked(batches.encode(words, examples, longest=256))
    answers = log_probs.of_model(
      model.config, model.params, arrays['tokens'], arrays['mask'])
    loss = bj.losses.sft(answers.log_probs, answers.mask)

A model is a pytree and `decoder` pure functions of it; adapters are one more
pytree (`lora`), which `lora.merge` and `weights.export` make a folder that
others read. Needs the extra `llm`; the decoder alone needs nothing.
"""
