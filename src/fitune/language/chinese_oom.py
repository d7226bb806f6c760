"""Translates what `fitune explain` and `fitune plan --snapshot` show."""

OUT_OF_MEMORY: dict[str, str] = {
    "the card": "显卡",
    "in tensors": "张量占用",
    "held by PyTorch, unused": "PyTorch 持有但未使用",
    "CUDA itself and other libraries": "CUDA 本身和其他库",
    "other processes": "其他进程",
    "free": "空闲",
    "in all": "总共",
    "asked for": "申请",
    "this process may reserve {limit} alone (set_per_process_memory_fraction): raise that": "这个进程最多只能保留 {limit}（set_per_process_memory_fraction）：请调高",
    "other processes hold {others}: end them (nvidia-smi lists them), and it fits": "其他进程占用 {others}：结束它们（用 nvidia-smi 查看）就放得下",
    "PyTorch holds {unused} that no tensor uses, in pieces smaller than {asked}: start with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which joins them": "PyTorch 持有 {unused} 没有张量使用的显存，但都是小于 {asked} 的碎片：启动时设 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True，可以把它们连起来",
    "{missing} are missing for this allocation alone, and later ones of the step may need more: halve the micro-batch and double the gradient accumulation (the same result), or turn gradient checkpointing on": "仅这一次分配就缺 {missing}，这一步后面的分配可能还需要更多：把微批大小减半、梯度累积加倍（结果相同），或打开梯度检查点",
    "what the whole step needs is predicted by: fitune plan --gpu CARD -- python YOUR_SCRIPT.py": "整个训练步需要多少显存，可以这样预测：fitune plan --gpu 显卡 -- python 你的脚本.py",
    "out of memory: {asked} were asked for, with {free} free on the card": "爆显存（OOM）：申请 {asked}，显卡上空闲 {free}",
    "allocated by": "由谁分配",
    "before the recording": "录制之前",
    "What a message that the card ran out of memory means, and what helps.": "解读爆显存（OOM）的报错，并说明怎样解决。",
    "a file with the message, such as a log; stdin by default": "含有报错的文件，例如日志；默认读标准输入",
    "show what filled a card, from a file of torch.cuda.memory._dump_snapshot": "根据 torch.cuda.memory._dump_snapshot 写出的文件，显示是什么占满了显卡",
}
