import warnings; warnings.simplefilter("ignore")
import torch, timm, traceback, sys, copy, io
import res2net_fused as rf
from timm.models.res2net import Bottle2neck
print(rf.__file__, torch.__version__)
def B():
    torch.manual_seed(0)
    return rf.accelerate(Bottle2neck(256, 64, base_width=26, scale=4).eval())
x = torch.randn(2,256,14,14)
def model():
    torch.manual_seed(0)
    m = timm.models.ResNet(block=Bottle2neck, layers=[1,1,1,1], base_width=26, num_classes=10, block_args=dict(scale=4)).eval()
    return m
img = torch.randn(1,3,64,64)
def step(name):
    def deco(f):
        if len(sys.argv)>1 and not any(a in name for a in sys.argv[1:]): return
        try:
            r=f(); print("OK  ", name, r if r is not None else "")
        except Exception as e:
            print("FAIL", name, type(e).__name__, str(e)[:400].replace("\n"," | "))
            if "-v" in sys.argv: traceback.print_exc()
    return deco
@step("meta")
def _(): return B().to("meta")(x.to("meta")).shape
@step("meta_train")
def _(): return B().train().to("meta")(x.to("meta")).shape
@step("script_block")
def _():
    b=B(); s=torch.jit.script(b); return (s(x)-b(x)).abs().max().item()
@step("script_model")
def _():
    m=rf.accelerate(model()); s=torch.jit.script(m); return (s(img)-m(img)).abs().max().item()
@step("script_rf")
def _():
    m=rf.models.res2net50().eval(); s=torch.jit.script(m); return (s(img)-m(img)).abs().max().item()
@step("script_rfblock")
def _():
    m=rf.Bottle2neck(256,64).eval(); s=torch.jit.script(m); return (s(x)-m(x)).abs().max().item()
@step("script_dla")
def _():
    m=rf.models.create_model("dla60_res2net").eval(); s=torch.jit.script(m); return (s(img)-m(img)).abs().max().item()
@step("script_feat")
def _():
    m=rf.models.create_model("res2net50_26w_4s", features_only=True).eval(); s=torch.jit.script(m); return type(s(img))
@step("trace_grad")
def _():
    b=B(); t=torch.jit.trace(b,x); return (t(x)-b(x)).abs().max().item(), "res2net_fused" in str(t.inlined_graph)
@step("trace_nograd")
def _():
    b=B()
    with torch.no_grad():
        t=torch.jit.trace(b,x); return (t(x)-b(x)).abs().max().item(), "res2net_fused" in str(t.inlined_graph)
@step("trace_op")
def _():
    w=[torch.randn(8,8,3,3) for _ in range(3)]
    t=torch.jit.trace(lambda x: rf.hierarchical_conv2d(x,w), torch.randn(1,32,9,9)); return "res2net_fused" in str(t.graph)
@step("fx_block")
def _():
    b=B(); g=torch.fx.symbolic_trace(b); return [n.op+":"+str(n.target) for n in g.graph.nodes][:8], (g(x)-b(x)).abs().max().item()
@step("fx_model")
def _():
    m=rf.accelerate(model()); g=torch.fx.symbolic_trace(m); out=g(img); return [n.op+":"+str(n.target) for n in g.graph.nodes][:8], (out-m(img)).abs().max().item(), sum(r.fused is True for r in rf.explain(g))
@step("tvfe")
def _():
    from torchvision.models.feature_extraction import create_feature_extractor
    m=rf.accelerate(model()); g=create_feature_extractor(m,{"layer1":"a","layer3.0":"b"}); out=g(img); print(rf.explain(g)); return {k:v.shape for k,v in out.items()}
@step("tvfe_inner")
def _():
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
    m=rf.accelerate(model()); print(get_graph_node_names(m)[1][:30]); g=create_feature_extractor(m,{"layer1.0.convs.1":"a","layer3.0":"b"}); out=g(img); print(rf.explain(g)); return {k:v.shape for k,v in out.items()}
@step("onnx_ep")
def _():
    b=B(); ep=torch.export.export(b,(x,)); p=torch.onnx.export(ep,dynamo=True); return set(n.domain for n in p.model.graph)
@step("onnx_ep_ng")
def _():
    b=B()
    with torch.no_grad():
        ep=torch.export.export(b,(x,)); p=torch.onnx.export(ep,dynamo=True); return set(n.domain for n in p.model.graph)
@step("export_train_cpu")
def _():
    b=rf.accelerate(Bottle2neck(256,64,base_width=26,scale=4).train(), backend="cpu")
    ep=torch.export.export(b,(x,)); f=io.BytesIO(); torch.export.save(ep,f); f.seek(0); e2=torch.export.load(f); return (e2.module()(x)-b(x)).abs().max().item()
@step("rundecomp")
def _():
    b=B()
    with torch.no_grad():
        ep=torch.export.export(b,(x,)); e2=ep.run_decompositions({}); 
        e3=ep.run_decompositions()
        return [str(n.target) for n in e3.graph.nodes if "res2net" in str(n.target)]
@step("ptflops")
def _():
    from ptflops import get_model_complexity_info as g
    r={}
    for be in ("aten","pytorch"):
        for acc in (0,1):
            b=Bottle2neck(256,64,base_width=26,scale=4).eval()
            if acc: rf.accelerate(b)
            r[be,acc]=g(b,(256,14,14),backend=be,as_strings=False,print_per_layer_stat=False,verbose=False)
    return r
@step("flopcounter")
def _():
    from torch.utils.flop_counter import FlopCounterMode
    r={}
    for acc in (0,1):
        for grad in (0,1):
            b=Bottle2neck(256,64,base_width=26,scale=4).eval()
            if acc: rf.accelerate(b)
            with torch.set_grad_enabled(bool(grad)):
                with FlopCounterMode(display=False) as f: b(x)
            r[acc,grad]=f.get_total_flops()
    return r
@step("withflops")
def _():
    from torch.profiler import profile, ProfilerActivity
    r={}
    for acc in (0,1):
        b=Bottle2neck(256,64,base_width=26,scale=4).eval()
        if acc: rf.accelerate(b)
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU],with_flops=True) as p: b(x)
        r[acc]=sum(e.flops for e in p.key_averages())
    return r
@step("fake")
def _():
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        m=rf.accelerate(Bottle2neck(256, 64, base_width=26, scale=4).eval()); print(rf.explain(m))
    b=B(); b(x); return rf.explain(b)
