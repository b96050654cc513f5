"""What each Jupyter server of `.venv` loads: `make .venv/lab` links this file into `.venv/etc/jupyter`.

With jupyter-server-nbmodel the server executes the cells and writes outputs into the notebook,
so they are kept when the browser closes. Three things are corrected here.
"""
import inspect
import json
import warnings
from pathlib import Path

from jupyter_server_nbmodel import actions

c = get_config()  # noqa: F821 (Jupyter defines it)

# By default the server closes a notebook 60 s after the last browser left, and drops later outputs.
c.YDocExtension.document_cleanup_delay = None

# When a line is rewritten, as progress bars do, jupyter-server-nbmodel 0.2.9 cuts the old text at a
# number of characters. pycrdt takes this number as UTF-8 bytes: with `█`, `Å` or `→` in the text it
# panics and the cell never ends. tests/test_lab.py fails when a newer version does it right.
IN_CHARACTERS = 'del previous_text[shared:]'
IN_BYTES = 'del previous_text[len(actual_text[:shared].encode()):]'
source = inspect.getsource(actions)
exec(compile(source.replace(IN_CHARACTERS, IN_BYTES), actions.__file__, 'exec'), vars(actions))


def keep_kernel_description(path, model, contents_manager, **_):
    """Save a notebook with the kernel's description as it stands in the file.

    The browser fills in display name and Python version of this machine's kernel as soon as a
    notebook is opened, and that is saved: each look at a notebook would be a change for git.
    """
    file = Path(contents_manager.root_dir) / path.strip('/')
    if model['type'] != 'notebook' or not file.exists():
        return
    before = json.loads(file.read_text(encoding='utf-8'))['metadata']
    metadata = model['content']['metadata']
    if before.get('kernelspec', {}).get('name') != metadata.get('kernelspec', {}).get('name'):
        return
    for key in ('kernelspec', 'language_info'):
        metadata.pop(key, None)
        if key in before:
            metadata[key] = before[key]


# The server sets up its contents manager twice and warns about the second time.
warnings.filterwarnings('ignore', message='Overriding existing pre_save_hook')
c.FileContentsManager.pre_save_hook = keep_kernel_description
