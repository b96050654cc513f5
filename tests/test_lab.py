"""JupyterLab keeps outputs: the real server, spoken to as a browser does."""
import inspect
import json
import os
import socket
import subprocess
import time

import pytest
from helpers import BIN, ROOT, env

requests = pytest.importorskip('requests')
websocket = pytest.importorskip('websocket')
actions = pytest.importorskip('jupyter_server_nbmodel.actions', reason='needs the extra `lab`')

BAR = """
from tqdm import tqdm
for i in tqdm(range({n}), mininterval=0, ascii=False): pass
print('end')
"""
LINES = """
for i in range({n}): print('distance 5.9 Å → 🧬', i, flush=True)
print('end')
"""
SLOW_LINES = """
import time
for i in range({seconds}): print('line', i, flush=True); time.sleep(1)
print('end')
"""


def code_cell(name, source):
    return dict(cell_type='code', id=name, metadata={}, execution_count=None, outputs=[], source=source)


def text_of(cell):
    return ''.join(''.join(output.get('text', '')) for output in cell['outputs'])


class Lab:
    """A JupyterLab on a folder, with the configuration that `make lab` uses."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        self.address = f'127.0.0.1:{port}'
        self.headers = {'Authorization': 'token x'}
        command = [BIN/'jupyter', 'lab', '--allow-root', '--no-browser', f'--port={port}',
                   '--IdentityProvider.token=x', f'--notebook-dir={folder}']
        home = folder.parent/'home'
        home.mkdir()
        settings = dict(JUPYTER_CONFIG_PATH=str(ROOT/'lab'), JUPYTER_CONFIG_DIR=str(home))
        self.log = home/'lab.log'
        with open(self.log, 'w') as log:
            self.process = subprocess.Popen(command, cwd=home, env=env(**settings), stdout=log, stderr=log)
        self.wait_for(self.answers, 60)

    def wait_for(self, condition, seconds):
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until and self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(.2)

    def answers(self):
        try:
            return requests.get(f'http://{self.address}/api/status', headers=self.headers, timeout=5).ok
        except requests.ConnectionError:
            return False

    def call(self, method, path, body):
        url = f'http://{self.address}/api/{path}'
        answer = requests.request(method, url, headers=self.headers, json=body, timeout=30)
        assert answer.ok, answer.text
        return answer.json()

    def open(self, name):
        """Enter the notebook's room, as a browser does → socket, name of the room."""
        session = self.call('PUT', f'collaboration/session/{name}', dict(format='json', type='notebook'))
        room = f"json:notebook:{session['fileId']}"
        address = f"ws://{self.address}/api/collaboration/room/{room}?sessionId={session['sessionId']}&token=x"
        browser = websocket.create_connection(address, timeout=30)
        # "Which state have you?" in the protocol of Yjs; the answer is the whole document.
        browser.send_binary(bytes([0, 0, 1, 0]))
        browser.recv()
        return browser, room

    def kernel(self, name):
        body = dict(path=name, type='notebook', name=name, kernel=dict(name='python3'))
        return self.call('POST', 'sessions', body)['kernel']['id']


@pytest.fixture
def lab(tmp_path):
    folder = tmp_path/'work'
    folder.mkdir()
    server = Lab(folder)
    server.folder = folder
    yield server
    server.process.terminate()
    server.process.wait(30)


def run_and_leave(lab, sources, seconds):
    """Execute cells in a new notebook and close the browser at once → its cells in the file."""
    file = lab.folder/'t.ipynb'
    cells = [code_cell(f'c{i}', source) for i, source in enumerate(sources)]
    kernelspec = dict(name='python3', display_name='python3', language='python')
    file.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernelspec), nbformat=4, nbformat_minor=5)))
    kernel = lab.kernel('t.ipynb')
    browser, room = lab.open('t.ipynb')
    for cell in cells:
        metadata = dict(document_id=room, cell_id=cell['id'])
        lab.call('POST', f'kernels/{kernel}/execute', dict(code=cell['source'], metadata=metadata))
    browser.close()

    def done():
        # Half a file while the server writes it.
        try:
            return json.loads(file.read_text())['cells'][-1]['execution_count'] is not None
        except json.JSONDecodeError:
            return False
    lab.wait_for(done, seconds)
    return json.loads(file.read_text())['cells']


def check(bar, lines, n):
    assert text_of(bar).rstrip().endswith('end') and '100%|██' in text_of(bar), text_of(bar)[-300:]
    assert text_of(bar).count('%|') == 1
    assert text_of(lines).splitlines() == [f'distance 5.9 Å → 🧬 {i}' for i in range(n)] + ['end']


def test_outputs_are_kept_without_a_browser_and_whatever_the_letters(lab):
    """A bar and lines that are not ASCII; and a look changes no file."""
    bar, lines = run_and_leave(lab, [BAR.format(n=200), LINES.format(n=200)], seconds=120)
    check(bar, lines, 200)
    assert [bar['execution_count'], lines['execution_count']] == [1, 2]

    before = (ROOT/'nbs'/'06_kaggle.ipynb').read_bytes()
    (lab.folder/'06_kaggle.ipynb').write_bytes(before)
    browser, _ = lab.open('06_kaggle.ipynb')
    # Longer than the second after which the server saves what has changed.
    time.sleep(2)
    browser.close()
    assert (lab.folder/'06_kaggle.ipynb').read_bytes() == before
    log = lab.log.read_text()
    assert 'PanicException' not in log and 'Traceback' not in log and 'UserWarning' not in log, log


@pytest.mark.skipif('LAB_TEST' not in os.environ, reason='2 min: make lab-test')
def test_outputs_are_kept_when_the_browser_is_gone_for_longer_than_a_minute(lab):
    sources = [SLOW_LINES.format(seconds=90), BAR.format(n=1000), LINES.format(n=1000)]
    slow, bar, lines = run_and_leave(lab, sources, seconds=300)
    assert text_of(slow).splitlines() == [f'line {i}' for i in range(90)] + ['end']
    check(bar, lines, 1000)


def configuration():
    """What lab/jupyter_server_config.py sets."""
    from traitlets.config.loader import PyFileConfigLoader
    return PyFileConfigLoader('jupyter_server_config.py', path=str(ROOT/'lab')).load_config()


def test_documents_stay_open():
    """By default they are closed a minute after the last browser left, and later outputs are lost."""
    assert configuration().YDocExtension.document_cleanup_delay is None


def test_upstream_still_counts_characters():
    """When this fails, a newer jupyter-server-nbmodel may be right: lab/jupyter_server_config.py can go."""
    assert inspect.getsource(actions).count('del previous_text[shared:]') == 1


def test_saving_keeps_the_kernel_as_the_file_describes_it(tmp_path):
    """A browser writes its kernel's name and version into a notebook as soon as it is opened."""
    from types import SimpleNamespace
    hook = configuration().FileContentsManager.pre_save_hook
    written = dict(kernelspec=dict(name='python3', display_name='python3'))
    (tmp_path/'a.ipynb').write_text(json.dumps(dict(metadata=written)))
    opened = dict(kernelspec=dict(name='python3', display_name='Python 3 (ipykernel)'), language_info=dict(version='3.11'))

    def saved(path, metadata):
        model = dict(type='notebook', content=dict(metadata=dict(metadata)))
        hook(path=path, model=model, contents_manager=SimpleNamespace(root_dir=str(tmp_path)))
        return model['content']['metadata']
    assert saved('a.ipynb', opened) == written
    assert saved('new.ipynb', opened) == opened
    another = dict(kernelspec=dict(name='julia', display_name='Julia'))
    assert saved('a.ipynb', another) == another
