"Fail if a notebook imports from itself or from a later notebook."
import json,re,sys
from notebooks import notebooks

order = {p.stem.split('_', 1)[1]: i for i,p in enumerate(notebooks())}
def code(p): return '\n'.join(''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code')
def imported(p): return re.findall(r'^\s*(?:from|import)\s+ribo_nb\.(\w+)', code(p), re.M) + re.findall(r'\w+', ' '.join(re.findall(r'^\s*from\s+ribo_nb\s+import(.*)', code(p), re.M)))
bad = [f"{p.name} imports ribo_nb.{m}: a notebook may import from lower numbers only" for i,p in enumerate(notebooks()) for m in imported(p) if order.get(m, i) >= i]
sys.exit('\n'.join(bad) or 0)
