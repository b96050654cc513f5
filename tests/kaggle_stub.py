"A Kaggle of our own on 127.0.0.1: the real client reaches it as its HTTP proxy. It records everything, and can be busy, refuse, stall and cut the line."
import base64,json,re,threading,time
from http.server import BaseHTTPRequestHandler,ThreadingHTTPServer
from types import SimpleNamespace

TOKEN,KEY = 'KGAT_do_not_leak_this_token','do_not_leak_this_key'

class Stub:
    def __init__(self):
        self.seen,self.faults,self.blobs = [],[],{}
        self.datasets,self.kernels,self.submissions,self.files,self.outputs = {},{},[],{},{}
        self.polls_until_ready,self.polls,self.need,self.status,self.failure,self.save,self.zipped = 0,0,0,'COMPLETE','',{},set()
        stub = self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            def log_message(self, *_): pass
            def do_POST(self): stub.handle(self)
            do_GET = do_PUT = do_POST
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(.05,), daemon=True).start()

    @property
    def url(self): return f'http://127.0.0.1:{self.server.server_port}'
    def names(self): return [s.name for s in self.seen]
    def fail(self, name, *kinds): self.faults += [(name, k) for k in kinds]  # each is used once

    def handle(self, h):
        body = h.rfile.read(int(h.headers.get('Content-Length') or 0)) if h.headers.get('Transfer-Encoding') != 'chunked' else _chunks(h.rfile)
        path = re.sub(r'^http://[^/]+', '', h.path)
        name = path.split('?')[0].split('/')[-1] if path.startswith('/api/') else path.split('/')[1]
        self.seen.append(SimpleNamespace(name=name, path=path, headers=dict(h.headers), body=body))
        fault = next((f for f in self.faults if f[0] == name), None)
        if fault: self.faults.remove(fault)
        kind = fault[1] if fault else None
        if kind == 'cut': return self.cut(h)
        if kind == 'slow': time.sleep(.5)
        if isinstance(kind, int): return self.answer(h, kind, dict(code=kind, message=f'the stub says {kind}'), {'Retry-After': '0'} if kind == 429 else {})
        if path.startswith('/api/'):
            auth = h.headers.get('Authorization', '')
            good = auth == f'Bearer {TOKEN}' or auth == 'Basic ' + base64.b64encode(f'someone:{KEY}'.encode()).decode() or name == 'IntrospectToken'
            code,out,more = getattr(self, name)(json.loads(body or b'{}')) if good else (401, dict(code=401, message='who are you?'), {})
        elif name == 'blob' and h.headers.get('Content-Range', '').startswith('bytes */'): code,out,more = 200 if path.split('/')[-1] in self.blobs else 308,b'',{}  # how much is there?
        elif name == 'blob': self.blobs[path.split('/')[-1]] = body; code,out,more = 200,b'',{}
        else: return self.file(h, (self.files if name == 'file' else self.outputs)[path.split('/', 2)[2]], kind)
        if kind == 'cut after': return self.cut(h)
        self.answer(h, code, out, more)

    def answer(self, h, code, out, headers):
        data = out if isinstance(out, bytes) else json.dumps(out).encode()
        h.send_response(code)
        for k,v in headers.items(): h.send_header(k, v)
        if not isinstance(out, bytes): h.send_header('Content-Type', 'application/json')
        h.send_header('Content-Length', str(len(data))); h.end_headers(); h.wfile.write(data)

    def cut(self, h): h.close_connection = True; h.connection.shutdown(2)

    def file(self, h, data, kind):
        "With ranges; 'half' sends half of what was asked for and cuts the line"
        begin = int(m[1]) if (m := re.match(r'bytes=(\d+)-', h.headers.get('Range', ''))) else 0
        h.send_response(206 if begin else 200)
        for k,v in {'Accept-Ranges': 'bytes', 'ETag': f'"{len(data)}"', 'Last-Modified': 'Sun, 01 Nov 2026 00:00:00 GMT', 'Content-Length': str(len(data)-begin)}.items(): h.send_header(k, v)
        h.end_headers()
        if kind == 'half': h.wfile.write(data[begin:begin+(len(data)-begin)//2]); h.wfile.flush(); return self.cut(h)
        h.wfile.write(data[begin:])

    # the account
    def IntrospectToken(self, q): return 200,dict(active=q['token'] == TOKEN, username='someone'),{}

    # datasets: ref → list of versions, each name → bytes
    def _blob_files(self, files): return {self.tokens[f['token']]: self.blobs.get(f['token'], b'') for f in files}
    tokens = {}
    def StartBlobUpload(self, q):
        t = f'blob{len(self.tokens)}'
        self.tokens[t] = q['name']
        return 200,dict(token=t, createUrl=f'http://localhost/blob/{t}'),{}
    def CreateDataset(self, q):
        ref = f"{q['ownerSlug']}/{q['slug']}"
        if ref in self.datasets: return 200,dict(status='error', error='the title is already in use'),{}
        assert q['isPrivate']
        self.datasets[ref],self.polls = [self._blob_files(q["files"])],0; self.need = self.polls_until_ready
        return 200,dict(status='ok', ref=ref, url=f'https://kaggle/{ref}'),{}
    def CreateDatasetVersion(self, q):
        self.datasets[f"{q['ownerSlug']}/{q['datasetSlug']}"].append(self._blob_files(q["body"]["files"])); self.polls,self.need = 0,self.polls_until_ready
        return 200,dict(status='ok', url='u'),{}
    def GetDataset(self, q):
        ref = f"{q['ownerSlug']}/{q['datasetSlug']}"
        if ref not in self.datasets: return 403,dict(code=403, message="Permission 'datasets.get' was denied"),{}
        n = len(self.datasets[ref])
        return 200,dict(ref=ref, currentVersionNumber=n if self.polls >= self.need else n-1),{}
    def GetDatasetStatus(self, q):
        if (ref := f"{q['ownerSlug']}/{q['datasetSlug']}") not in self.datasets: return 404,dict(code=404, message='not found'),{}
        self.polls += 1
        return 200,dict(status='READY' if self.polls > self.need or self.polls == 1 and len(self.datasets[ref]) > 1 else 'BLOBS_RECEIVED'),{}  # the old version is ready still

    # kernels: ref → list of what was saved
    def SaveKernel(self, q):
        if self.save.get('error'): return 200,self.save,{}
        self.kernels.setdefault(q['slug'], []).append(q)
        return 200,dict(ref=q['slug'], url=f"https://kaggle/{q['slug']}", versionNumber=len(self.kernels[q['slug']])) | self.save,{}
    def GetKernel(self, q):
        ref = f"{q['userName']}/{q['kernelSlug']}"
        if ref not in self.kernels: return 403,dict(code=403, message='denied'),{}
        return 200,dict(metadata=dict(ref=ref, currentVersionNumber=len(self.kernels[ref])), blob=dict(source=self.kernels[ref][-1]['text'])),{}
    def GetKernelSessionStatus(self, q):
        if f"{q['userName']}/{q['kernelSlug']}" not in self.kernels: return 403,dict(code=403, message='denied'),{}
        return 200,dict(status=self.status, failureMessage=self.failure),{}
    def ListKernelSessionOutput(self, q):
        names,at = sorted(self.outputs),int(q.get('pageToken') or 0)
        return 200,dict(files=[dict(fileName=n, url=f'http://localhost/output/{n}') for n in names[at:at+2]], log=json.dumps([dict(data='the last line\n')]),
                        nextPageToken=str(at+2) if at+2 < len(names) else ''),{}

    # the competition
    def ListDataFiles(self, q): return 200,dict(files=[dict(name=n, totalBytes=len(d)) for n,d in self.files.items() if not n.endswith('.zip')]),{}
    def DownloadDataFile(self, q):
        n = q['fileName'] + ('.zip' if q['fileName'] in self.zipped else '')
        return 302,b'',{'Location': f'http://localhost/file/{n}'}
    def StartSubmissionUpload(self, q): return 200,dict(token='sub', createUrl='http://localhost/blob/sub'),{}
    def CreateSubmission(self, q):
        self.submissions.append(dict(ref=len(self.submissions)+1, description=q['submissionDescription'], fileName='f', status='PENDING'))
        return 200,dict(message='Successfully submitted to Stanford Ribonanza RNA Folding', ref=len(self.submissions)),{}
    def ListSubmissions(self, q): return 200,dict(submissions=self.submissions),{}

def _chunks(f):
    out = b''
    while n := int(f.readline().strip() or b'0', 16): out += f.read(n); f.readline()
    f.readline()
    return out
