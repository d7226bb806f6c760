"""What is done with a trained model: chat, export, and the answers at evaluations."""

AFTER_TRAINING: dict[str, str] = {
    "A conversation with the fine-tuned model.": "与微调后的模型对话。",
    "0 always takes the most likely token": "0 表示总取概率最大的 token",
    "only the most likely tokens that together have this probability": "只取概率最大的、合计达到这个概率的 token",
    "the longest answer, in tokens": "回答最长多少 token",
    "of the random numbers; equal seeds, equal answers": "随机数的种子；种子相同，回答就相同",
    "a Jinja chat template file; the model's own where left out": "一个 Jinja 聊天模板文件；不给则用模型自带的",
    "a run's directory or name, an exported directory, or a .gguf file": (
        "运行的目录或名字、导出的目录，或 .gguf 文件"
    ),
    "also ask the base model, in a conversation of its own": "同时问基座模型，各自保持自己的对话",
    "gguf: number format of the matrices; f16 where left out": "gguf：矩阵的数值格式；不给则为 f16",
    "hf, gguf: the adapters alone instead of the merged model": "hf、gguf：只写适配器，不写合并后的模型",
    "hf: a transformers directory; gguf: for llama.cpp and Ollama; minimind, or pth: a .pth": (
        "hf：transformers 目录；gguf：供 llama.cpp 和 Ollama 用；minimind 或 pth：.pth 文件"
    ),
    "{source} holds no adapters: drop --adapter": "{source} 里没有适配器：请去掉 --adapter",
    "--quantise is of a whole model as GGUF: give --to gguf without --adapter, or drop it": (
        "--quantise 只用于整个模型的 GGUF：请给 --to gguf 且不带 --adapter，或去掉它"
    ),
    "--to {to} merges adapters: drop --adapter, or use --to hf": (
        "--to {to} 会合并适配器：请去掉 --adapter，或用 --to hf"
    ),
    "--exact has no effect with --to {to}: drop it": "--exact 与 --to {to} 同用时不起作用：请去掉",
    "--to gguf needs the package gguf: {install}": "--to gguf 需要 gguf 包：{install}",
    "eval.new_tokens has no effect without eval.prompts: give some, or drop it": (
        "没有 eval.prompts 时 eval.new_tokens 不起作用：请给出 eval.prompts，或去掉它"
    ),
    "eval.prompts are answered at evaluations, and data.eval_fraction is 0: give evaluation "
    "data, or drop them": (
        "eval.prompts 在评估时回答，而 data.eval_fraction 是 0：请给评估数据，或去掉它们"
    ),
    "eval.prompts does not work with model.shard full: drop one of them": (
        "eval.prompts 不能与 model.shard full 同用：请去掉其中一个"
    ),
    "questions that are answered, and the answers kept, at each evaluation": "每次评估时要回答的问题，回答会保存下来",
    "tokens of an answer to eval.prompts, at most": "对 eval.prompts 的回答最多多少 token",
    "the chat template refuses this conversation: {error}": "聊天模板拒绝这段对话：{error}",
    "{source} has no chat template, which turns a conversation into tokens: give one with "
    "--template FILE.jinja": (
        "{source} 没有聊天模板，无法把对话变成 token：请用 --template FILE.jinja 给一个"
    ),
    "the conversation has {num_tokens} tokens and the model {most} positions: begin a new "
    "one with /reset": (
        "对话有 {num_tokens} token，而模型只有 {most} 个位置：请用 /reset 开始新的对话"
    ),
    "the tokenizer has {part}, for which fitune knows no name in llama.cpp: use --to hf, and "
    "convert that by llama.cpp's convert_hf_to_gguf.py": (
        "分词器有{part}，fitune 不知道它在 llama.cpp 里的名字：请用 --to hf，再用 llama.cpp 的 "
        "convert_hf_to_gguf.py 转换"
    ),
    "a {kind} model that is not a BPE of bytes with merges": " {kind} 模型，不是带合并表的字节级 BPE",
    "the normalizer {kind}": "规范化器 {kind}",
    "the pre-tokenizer {kind}": "预分词器 {kind}",
    "llama.cpp has no place for {key} of an adapter: export the merged model, without --adapter": (
        "llama.cpp 没有地方放适配器的 {key}：请导出合并后的模型，不带 --adapter"
    ),
    "fitune cannot write this model as GGUF: {reason}; use --to hf, and convert that by "
    "llama.cpp's convert_hf_to_gguf.py": (
        "fitune 不能把这个模型写成 GGUF：{reason}；请用 --to hf，再用 llama.cpp 的 convert_hf_to_gguf.py 转换"
    ),
    "'{kind}' is none of {kinds}": "'{kind}' 不在 {kinds} 之中",
    "its attention has biases": "它的注意力有偏置",
    "only a part of each head is rotated": "每个头只旋转一部分",
    "the weights of its experts are not normalised": "它的专家权重没有归一化",
    "llama.cpp has no place for {key}: use --to hf, and convert that by its "
    "convert_hf_to_gguf.py": (
        "llama.cpp 没有地方放 {key}：请用 --to hf，再用它的 convert_hf_to_gguf.py 转换"
    ),
    "{name} holds values beyond float16: use --quantise bf16 or f32": (
        "{name} 里有超出 float16 范围的值：请用 --quantise bf16 或 f32"
    ),
    "{directory} holds {files} GGUF files: give one of them, such as {file}": (
        "{directory} 里有 {files} 个 GGUF 文件：请给其中一个，例如 {file}"
    ),
    "{path} is a model and no run: drop --weights": "{path} 是模型而不是运行：请去掉 --weights",
    "{path} does not say which model it was made of: drop --base": "{path} 没有说明它由哪个模型得来：请去掉 --base",
    "the chat template refuses eval.prompts {text}: {error}": "聊天模板拒绝 eval.prompts {text}：{error}",
    "eval.prompts {text} has {ids} tokens, and with eval.new_tokens {new_tokens} it exceeds "
    "data.max_length {max_length}: shorten it, or lower eval.new_tokens": (
        "eval.prompts {text} 有 {ids} token，加上 eval.new_tokens {new_tokens} 超过 "
        "data.max_length {max_length}：请缩短它，或调低 eval.new_tokens"
    ),
    "eval.prompts: {prompts} answers at each evaluation, one at a time between steps; the "
    "key-value cache takes up to {size}, which the plan does not count": (
        "eval.prompts：每次评估生成 {prompts} 个回答，在两步之间逐个生成；KV 缓存最多占 {size}，规划不计入"
    ),
    "step {step}: no memory for the answers to eval.prompts": "第 {step} 步：没有显存来回答 eval.prompts",
}
