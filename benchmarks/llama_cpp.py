"""llama.cpp computes what the run's model computes, from the GGUF file that was exported.

    pip install cyllama    # llama.cpp with bindings, without dependencies
    fitune export runs/first --to gguf -o first-gguf
    python benchmarks/llama_cpp.py runs/first first-gguf/first-f16.gguf

Prints whether both read the same tokens, how far the logits of the last token differ, and what
llama.cpp answers.
"""

import sys
from pathlib import Path

import torch
from cyllama import chat
from cyllama.llama import llama_cpp

from fitune.model.answer import chat_template
from fitune.model.saved import load_run, saved_weights
from fitune.run.directory import open_run

QUESTION = "What is bioinformatics?"


class Model(llama_cpp.LlamaModel):
    """Its context asks the model for a number that only the vocabulary has."""

    @property
    def n_vocab(self) -> int:
        return self.get_vocab().n_vocab


def main(run_path: str, gguf_path: str) -> None:
    run = open_run(Path(run_path))
    model, tokenizer = load_run(run, saved_weights(run), trust_remote_code=False)
    template = chat_template(tokenizer, None, source=run_path)
    text = template.render([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        ours = model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].float()
    there = Model(gguf_path)
    theirs_ids = list(there.get_vocab().tokenize(text, False, True))
    parameters = llama_cpp.LlamaContextParams()
    parameters.n_ctx = parameters.n_batch = 512
    context = llama_cpp.LlamaContext(there, parameters)
    context.decode(llama_cpp.llama_batch_get_one(ids))
    theirs = torch.tensor(context.get_logits())
    print(f"tokens      {len(ids)}, {'the same' if theirs_ids == ids else 'others in llama.cpp'}")
    difference = (theirs - ours).abs().max().item()
    print(f"logits      differ by {difference:.4f} at most, of {ours.abs().max().item():.2f}")
    same = ours.topk(5).indices.tolist() == theirs.topk(5).indices.tolist()
    print(f"first five  {'the same' if same else 'others'}")
    messages = [{"role": "user", "content": QUESTION}]
    answer = chat(messages, model_path=gguf_path, max_tokens=32, temperature=0.0)
    print(f"answer      {' '.join(str(answer).split())}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
