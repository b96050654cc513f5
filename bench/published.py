"What bench/models.py compares with: the 2nd place's arithmetic done literally, and a bare attention encoder."
import torch,torch.nn.functional as F
from einops import rearrange
from torch import nn

def distance(l): return (torch.arange(l)[:,None] - torch.arange(l)).abs()

def heads(x, order, h): return rearrange(x, f'b l ({order}) -> three b h l k', three=3, h=h)

class Gate(nn.Module):
    def forward(self, x):
        a,b = x.chunk(2, -1)
        return a*F.silu(b)

class MaskedBatchNorm(nn.BatchNorm1d):
    def forward(self, x, mask): # b d l
        m = mask[:,None].to(x.dtype)
        mean = ((x*m).sum((0, 2))/m.sum())[None,:,None]
        var = ((((x - mean)*m)**2).sum((0, 2))/m.sum())[None,:,None]
        return (x - mean)/torch.sqrt(var + self.eps)*self.weight[None,:,None] + self.bias[None,:,None]

class Conv(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.up,self.gate,self.down,self.drop = nn.Linear(d, 2*d),Gate(),nn.Linear(d, d),nn.Dropout(.1)
        self.conv,self.norm = nn.Conv1d(d, d, 17, padding='same', groups=d, bias=False),MaskedBatchNorm(d)
    def forward(self, x, mask, bias):
        x = self.gate(self.up(x)).permute(0, 2, 1).masked_fill(~mask[:,None], 0.)
        return self.down(self.drop(F.silu(self.norm(self.conv(x), mask)).permute(0, 2, 1)))

class Attention(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.h,self.scale,self.qkv,self.out,self.drop = h,d**-.5,nn.Linear(d, 3*d),nn.Linear(d, d),nn.Dropout(.1)
    def forward(self, x, mask, bias):
        q,k,v = heads(self.qkv(x), 'h three k', self.h)
        a = (q @ k.transpose(-1, -2)*self.scale + bias).masked_fill(~mask[:,None,None], torch.finfo(torch.float32).min)
        return self.out(rearrange(self.drop(F.softmax(a, -1)) @ v, 'b h l k -> b l (h k)'))

class Mix(nn.Sequential):
    def __init__(self, d): super().__init__(nn.Linear(d, 4*d), Gate(), nn.Dropout(.1), nn.Linear(2*d, d))
    def forward(self, x, mask, bias): return super().forward(x)

class Step(nn.Module):
    "Residual step: whole sequences dropped, an affine map, a norm after"
    def __init__(self, d, inner):
        super().__init__()
        self.inner,self.norm,self.w,self.b = inner,nn.LayerNorm(d),nn.Parameter(torch.ones(d)),nn.Parameter(torch.zeros(d))
    def forward(self, x, *args):
        y = self.inner(x, *args)
        return self.norm(x + y*y.new_empty(len(y), 1, 1).bernoulli_(.9).div_(.9)*self.w + self.b)

class SecondPlace(nn.Module):
    "12 × 192, 4 heads, norm after, BPP through two 7 × 7 convolutions at 64 channels, GRU"
    def __init__(self, d=192, n=12, h=4):
        super().__init__()
        self.h,self.drop,self.norm = h,nn.Dropout(.1),nn.LayerNorm(d)
        self.kinds = nn.ModuleList([nn.Embedding(5, d), nn.Embedding(4, d), nn.Embedding(8, d)])
        self.capr,self.pairs,self.proj = nn.Linear(6, d),nn.Linear(3, d),nn.Linear(5*d, d)
        self.conv1,self.conv2 = nn.Conv2d(1, 64, 7, padding=3),nn.Conv2d(64, h, 7, padding=3)
        self.steps = nn.ModuleList(Step(d, f) for _ in range(n) for f in (Conv(d), Mix(d), Attention(d, h), Mix(d)))
        self.last,self.gru,self.head = nn.Dropout(.5),nn.GRU(d, d, batch_first=True),nn.Linear(d, 2)
    def forward(self, batch):
        seq,bpp,mask = batch['seq'],batch['bpp'],batch['mask']
        a,b,c = self.kinds
        pairs = torch.stack([bpp.sum(-1), (bpp == 0).float().mean(-1), bpp.amax(-1)], -1)
        x = torch.cat([a(seq), b(seq % 4), self.pairs(pairs), c(seq), self.capr(F.one_hot(seq, 6).float())], -1)
        x = self.norm(self.drop(self.proj(self.drop(x))))
        slope = 2.**-torch.arange(2, 2*self.h + 1, 2)[:,None,None]
        bias = self.conv2(F.relu(self.conv1(bpp[:,None]))) - distance(seq.shape[1])*slope
        for step in self.steps: x = step(x, mask, bias)
        return self.head(self.gru(self.last(x))[0])

class Bare(nn.Module):
    "12 × 256, 8 heads, norm before, PyTorch's own attention with a bias, feed-forward 4×; nothing else"
    def __init__(self, d=256, n=12, h=8):
        super().__init__()
        self.h,self.kind,self.head = h,nn.Embedding(5, d),nn.Linear(d, 2)
        self.blocks = nn.ModuleList(nn.ModuleList([nn.LayerNorm(d), nn.Linear(d, 3*d), nn.Linear(d, d), nn.Sequential(
            nn.LayerNorm(d), nn.Linear(d, 4*d), nn.GELU(), nn.Linear(4*d, d))]) for _ in range(n))
    def forward(self, batch):
        x = self.kind(batch['seq'])
        bias = batch['bpp'][:,None] - distance(x.shape[1])*(2.**-torch.linspace(1, 8, self.h))[:,None,None]
        for norm,qkv,out,mlp in self.blocks:
            q,k,v = heads(qkv(norm(x)), 'three h k', self.h)
            x = x + out(rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), 'b h l k -> b l (h k)'))
            x = x + mlp(x)
        return self.head(x)
