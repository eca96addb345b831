"""Libraries that open an export by themselves, a file each, found by `permlab.sparsity.layout`.

A file has `layout(model, tokenizer, normalisation) -> Layout | None`: how a folded model, its gathers in it, is laid
out for its library; None if it is none of that library's models. `tokenizer` is that of the text, or None;
`normalisation` that of the images.
"""
