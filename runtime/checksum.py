"""SHA-256 of files, of weights, and of plain values."""
import hashlib
import json


def of_file(path, block=1 << 22, on_block=None):
    """SHA-256 of a file, in hexadecimal digits; `on_block` is called with the bytes of each block that was read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(block):
            digest.update(data)
            if on_block:
                on_block(len(data))
    return digest.hexdigest()


def of_weights(*modules):
    """SHA-256 of the names and values of the modules' weights and buffers, wherever they lie."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def of_value(value):
    """SHA-256 of a value of JSON, whatever the order of its dictionaries."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
