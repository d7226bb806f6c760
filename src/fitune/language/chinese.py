"""The Chinese of what `say` is given, by its English. One part for each command, so that they grow apart."""

_PLAN: dict[str, str] = {}

_REPORT: dict[str, str] = {}

_WATCH: dict[str, str] = {
    "running": "运行中",
    "finished": "已完成",
    "stopped": "已停止",
    "failed": "失败",
    "crashed": "已崩溃",
    "damaged": "已损坏",
    "step": "步",
    "left": "剩余",
    "no word for {seconds}": "已 {seconds} 没有消息",
    "memory: no sample yet": "内存：尚无采样",
    "card": "显卡",
    "now": "当前",
    "peak": "峰值",
    "budget": "预算",
    "program": "程序本身",
    "weights, gradients, optimizer": "权重、梯度、优化器",
    "activations, temporaries": "激活值、临时张量",
    "cache (reserved, not in use)": "缓存（已保留未使用）",
    "CUDA context": "CUDA 上下文",
    "other processes": "其他进程",
    "free": "空闲",
    "loss: no step yet": "损失：尚未完成一步",
    "loss": "损失",
    "eval {loss:.3f} at step {step:,}": "第 {step:,} 步评估 {loss:.3f}",
    "best": "最佳",
    "tokens/s": "token/秒",
    "rows": "行",
    "gradient": "梯度",
    "tokens": "token",
    "slowed down by {reason}": "因 {reason} 降频",
    "spill {size}": "溢出到系统内存 {size}",
    "{count} retries": "重试 {count} 次",
    "{count} out of memory": "显存不足 {count} 次",
    "disk {size} free": "磁盘剩余 {size}",
    "q leaves; the run goes on": "按 q 离开，训练继续",
}

CHINESE: dict[str, str] = {**_PLAN, **_REPORT, **_WATCH}
