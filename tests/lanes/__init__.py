"""The two ways this project's tests reach a KVM: the host's own, and one emulated by QEMU."""
