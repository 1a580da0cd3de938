"""The method, naively: Eq. 6 from full logits; and in float64 Eq. 3 to 5 of everything concatenated."""

import torch

from tests.support.models import trainable


def widen(tensor):
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.double().reshape(-1)


def concatenate(gradients):
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(widen(gradient) for gradient in gradients)])


def surgery(user_grads, alignment_grads, rho=1.0):
    """Return the final gradient, a float64 vector or None for each entry, and what was decided."""
    pairs = list(zip(user_grads, alignment_grads, strict=True))
    both = [(user, alignment) for user, alignment in pairs if user is not None and alignment is not None]
    u, a = concatenate([user for user, _ in both]), concatenate([alignment for _, alignment in both])
    inner = float(u @ a)
    removal = -inner / float(a @ a) if inner < 0 else 0.0
    final = []
    for user, alignment in pairs:
        if user is None:
            final.append(None if alignment is None else rho * widen(alignment))
        elif alignment is None:
            final.append(widen(user))
        else:
            projected = widen(user) + removal * widen(alignment)
            final.append(projected + rho * widen(alignment))
    all_u = concatenate([user for user in user_grads if user is not None])
    all_a = concatenate([alignment for alignment in alignment_grads if alignment is not None])
    norms = float(all_u.norm()), float(all_a.norm())
    return final, {
        "inner_product": inner,
        "cosine": inner / (norms[0] * norms[1]) if min(norms) > 0 else 0.0,
        "user_norm": norms[0],
        "alignment_norm": norms[1],
        "conflict": inner < 0,
        "final_norm": float(concatenate([gradient for gradient in final if gradient is not None]).norm()),
    }


def alignment_gradient(ref_model, model, batches, positions="response"):
    """Eq. 6 over padded batches and its gradient, from full logits, by autograd alone."""
    total, tokens = 0.0, 0
    for batch in batches:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        compared = batch["labels"] != -100 if positions == "response" else batch["attention_mask"].bool()

        def log_probs(of, inputs=inputs, keep=compared[:, 1:]):
            return of(**inputs, use_cache=False).logits[:, :-1][keep].double().log_softmax(-1)

        with torch.no_grad():
            ref = log_probs(ref_model)
        total = total + (ref.exp() * (ref - log_probs(model))).sum()
        tokens += len(ref)
    loss = total / tokens
    return loss.detach(), torch.autograd.grad(loss, trainable(model), allow_unused=True)
