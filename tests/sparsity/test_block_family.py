from permlab.sparsity.block_family import Family, Line, split_name


def test_a_block_may_have_what_any_field_names() -> None:
    lines = (Line("a", "a[1/3] b", "c[2] d"), Line("e", "e", attention="attn"))
    family = Family(models=("X",), needs="n", lines=lines, writes="w", norms="s t", others="o", ends={0: "p"}, head="h")
    assert family.names() == set("nwstoabcde")


def test_a_name_may_have_a_stretch() -> None:
    assert split_name("attn.qkv[1/3]") == ("attn.qkv", "1/3")
    assert split_name("attn.qkv[2]") == ("attn.qkv", "2")
    assert split_name("attn.qkv") == ("attn.qkv", "")
