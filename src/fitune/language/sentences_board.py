"""Sentences of `fitune board`: errors, and its help."""

BOARD_SENTENCES: dict[str, str] = {
    "A page in the browser: plan, start, watch and compare runs.": (
        "浏览器里的页面：规划、启动、观察和比较运行。"
    ),
    "of the page on 127.0.0.1; 0 for any that is free": (
        "页面在 127.0.0.1 上的端口；0 为任意空闲端口"
    ),
    "open the page in a browser": "在浏览器里打开页面",
    "port {port:n} is in use, perhaps by another board: give another one with --port": (
        "端口 {port} 已被占用，可能是另一个面板：请用 --port 另给一个"
    ),
    "port {port:n} cannot be used: {reason}; give another": "端口 {port} 不能用：{reason}；请另给一个",
    "--port {port} is no port: give 1024 to 65535": "--port {port} 不是端口：请给 1024 到 65535",
    "{name} is not the name of a run in {directory}": "{name} 不是 {directory} 中运行的名称",
    "{path} is running already": "{path} 已经在运行",
    "no process of this machine works on {path}: there is nothing to stop here": (
        "本机没有进程在处理 {path}：这里没有可停止的运行"
    ),
    "on Windows a run is stopped by Ctrl-C in its own window: {path}": (
        "在 Windows 上，请在运行自己的窗口里按 Ctrl-C 停止：{path}"
    ),
    "the process of the run ended with exit code {code}": "运行的进程已结束，退出码 {code}",
    "no data is chosen: a run needs data.train": "没有选择数据：运行需要 data.train",
    "no model is chosen: give a preset, a directory, a config.json or a hub id": (
        "没有选择模型：请给预设、目录、config.json 或 hub id"
    ),
    "a request of this board is JSON: send content-type application/json": (
        "面板的请求是 JSON：请使用 content-type application/json"
    ),
    "a request of this board is JSON: {reason}": "面板的请求是 JSON：{reason}",
    "a request of this board has at most {size} bytes": "面板的请求至多 {size} 字节",
    "this board does not understand '{name}': {reason}": "面板不理解 '{name}'：{reason}",
}
