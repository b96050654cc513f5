"What the tests share: running our commands as a user does, and a small store to run them on."
import os,subprocess,sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
REAL = ROOT.parent/'shared'/'data'
TINY = '{"d_model": 16, "n_layer": 1, "n_epoch": 2, "batch_size": 8, "device": "cpu", "precision": "fp32"}'

def env(**more):
    "Our commands first in PATH; two threads, whatever the machine"
    return dict(os.environ, PATH=f'{BIN}{os.pathsep}{os.environ["PATH"]}', OMP_NUM_THREADS='2', **more)

def call(*args, cwd=ROOT, timeout=600):
    "Run a command to its end → CompletedProcess with text output"
    return subprocess.run([str(BIN/args[0]), *map(str, args[1:])], cwd=cwd, env=env(), capture_output=True, text=True, timeout=timeout)

def start(*args, cwd=ROOT):
    "Start a command in its own session"
    return subprocess.Popen([str(BIN/args[0]), *map(str, args[1:])], cwd=cwd, env=env(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)

def invoke(name, *args):
    "The same command in this process, which saves its start-up → click's Result"
    from click.testing import CliRunner
    import ribo_nb.bpp_store,ribo_nb.convert,ribo_nb.data_command,ribo_nb.infer,ribo_nb.kaggle,ribo_nb.score,ribo_nb.train
    command = next(getattr(m, name) for m in (ribo_nb.convert, ribo_nb.bpp_store, ribo_nb.train, ribo_nb.infer, ribo_nb.score, ribo_nb.kaggle) if hasattr(m, name))
    # As the console script does: ribo_data is handed the download of a later room.
    handed = ribo_nb.data_command.fetch_tables if name == 'ribo_data' else None
    return CliRunner().invoke(command, [str(a) for a in args], obj=handed)
