from tests.core.cluster import *
from tests.core.builders import *
import pytest
from p2pkv.core import messages
def test_challenge():
    c=Cluster("a","b")
    c.run(20)
    old=c.nodes["a"]
    c.nodes["old-a"]=old
    c.done.clear()
    new=c.boot("a")
    try:
        c.run(0.5)
    except AssertionError as e:
        pass
    for n,e in c.done[:60]: print(n, type(e).__name__, getattr(e,"link",""), type(getattr(e,"message",None)).__name__, getattr(e,"reason",""))
