"""PCI Express as a guest sees it: a host bridge, functions on bus 0, BARs, MSI-X. No KVM."""
