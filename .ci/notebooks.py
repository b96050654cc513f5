"""The book: the numbered notebooks of nbs/, and nothing else that lies there.

    python .ci/notebooks.py            their paths
    python .ci/notebooks.py export     write ribo_nb/ from them, and clean them
    python .ci/notebooks.py test       run their lessons
    python .ci/notebooks.py run        execute them in place: their outputs are committed

nbdev itself takes every notebook that it finds. A copy of 04_train that papermill has executed into
nbs/, or JupyterLab's 04_train-Copy1.ipynb, would then overwrite ribo_nb/train.py.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# 04_train.ipynb, 01b_structure.ipynb; not 04_train-Copy1.ipynb, 04_train (2).ipynb, out.ipynb
NUMBERED = r'^[0-9]{2}[a-z]?_[a-z0-9_]+\.ipynb$'


def notebooks():
    return sorted(path for path in Path('nbs').iterdir() if re.match(NUMBERED, path.name))


def module_of(path):
    """The module that a notebook exports, or None."""
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        directive = re.search(r'^#\s*\|\s*default_exp\s+(\S+)', ''.join(cell['source']), re.M)
        if cell['cell_type'] == 'code' and directive:
            return directive[1]


def refuse_two_of_one_module():
    """Stop if two notebooks would write the same file of ribo_nb/."""
    first = {}
    for path in notebooks():
        module = module_of(path)
        if module in first:
            sys.exit(f'check: {first[module]} and {path} both export ribo_nb/{module}.py, so the later would win: '
                     f'rename or remove one of them (or change its `#| default_exp {module}`)')
        if module:
            first[module] = path


def export():
    from nbdev.clean import nbdev_clean
    from nbdev.doclinks import nbdev_export
    refuse_two_of_one_module()
    nbdev_export(file_re=NUMBERED)
    for path in notebooks():
        nbdev_clean(fname=path)


def test():
    from nbdev.test import nbdev_test
    nbdev_test(file_re=NUMBERED, n_workers=2)


def without_traces_of_this_run(outputs):
    """Outputs as each run has them: one piece per stream, no folders of this machine, no word about compiling."""
    merged = []
    for output in outputs:
        if output['output_type'] == 'stream':
            output['text'] = [line for line in ''.join(output['text']).splitlines(keepends=True)
                              if not line.startswith('compiling the folding engine')]
            if not output['text']:
                continue
        last = merged[-1] if merged else {}
        if output['output_type'] == 'stream' and output['name'] == last.get('name'):
            last['text'] = ''.join([*last['text'], *output['text']]).splitlines(keepends=True)
        else:
            merged.append(output)
    temporary = re.escape(tempfile.gettempdir()) + r'/tmp\w{8}'
    text = re.sub(temporary, '/tmp/folder', json.dumps(merged))
    return json.loads(re.sub(r'/[^" ]*/site-packages/', '', text))


def run():
    # Bars show seconds, and these differ each time.
    env = dict(os.environ, TQDM_DISABLE='1')
    for path in notebooks():
        jupyter = Path(sys.executable).with_name('jupyter')
        subprocess.run([jupyter, 'execute', '--inplace', path], env=env, check=True)
        notebook = json.loads(path.read_text(encoding='utf-8'))
        for cell in notebook['cells']:
            if cell['cell_type'] == 'code':
                cell['outputs'] = without_traces_of_this_run(cell['outputs'])
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    export()


if __name__ == '__main__':
    if sys.argv[1:] == ['export']:
        export()
    elif sys.argv[1:] == ['run']:
        run()
    elif sys.argv[1:] == ['test']:
        test()
    else:
        print(*notebooks(), sep='\n')
