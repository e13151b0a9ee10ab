import glob, collections, tempfile, jax
def profile(f, args, steps=5, feed=None):
    """mean device us per step: busy (sum of kernels), span, and by-name table"""
    for _ in range(2): args = f(*args)
    jax.block_until_ready(args)
    d = tempfile.mkdtemp()
    with jax.profiler.trace(d):
        for _ in range(steps): args = f(*args)
        jax.block_until_ready(args)
    pd = jax.profiler.ProfileData.from_file(glob.glob(d + "/**/*.xplane.pb", recursive=True)[0])
    ev=[]
    for pl in pd.planes:
        if "GPU:0" not in pl.name: continue
        for line in pl.lines:
            if not line.name.startswith("Stream"): continue
            for e in line.events: ev.append((e.start_ns,e.duration_ns,e.name))
    ev.sort()
    agg=collections.Counter(); cnt=collections.Counter()
    for s,dn,n in ev: agg[n]+=dn; cnt[n]+=1
    busy=sum(x[1] for x in ev)/steps/1e3; span=(ev[-1][0]+ev[-1][1]-ev[0][0])/steps/1e3 if ev else 0
    return busy, span, [(n[:50],cnt[n]/steps,agg[n]/cnt[n]/1e3) for n in sorted(agg,key=agg.get,reverse=True)][:4], args
