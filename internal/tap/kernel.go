package tap

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf/btf"
)

// ErrKernel: this kernel's structures are not what the programs rely on.
var ErrKernel = errors.New("this kernel cannot be tapped")

// operations are the numbers that bpf/tap.bpf.c has; the kernel may give others one day.
var operations = map[string]uint64{
	"REQ_OP_WRITE": 1, "REQ_OP_DISCARD": 3, "REQ_OP_SECURE_ERASE": 5, "REQ_OP_WRITE_ZEROES": 9, "REQ_OP_DRV_IN": 34, "REQ_OP_DRV_OUT": 35,
}

// checkKernel holds what the programs take for granted, and do not have
// relocated when they are loaded, against the kernel's own types.
func checkKernel(types *btf.Cache) error {
	spec, err := types.Kernel()
	if err != nil {
		return fmt.Errorf("%w: its type information (CONFIG_DEBUG_INFO_BTF): %w", ErrKernel, err)
	}
	var ops *btf.Enum
	if err := spec.TypeByName("req_op", &ops); err != nil {
		return fmt.Errorf("%w: the operations of its block layer: %w", ErrKernel, err)
	}
	found := 0
	for _, v := range ops.Values {
		if want, ok := operations[v.Name]; ok {
			if found++; v.Value != want {
				return fmt.Errorf("%w: %s is %d, not %d", ErrKernel, v.Name, v.Value, want)
			}
		}
	}
	if found != len(operations) {
		return fmt.Errorf("%w: %d of the %d operations that a tap looks at are there", ErrKernel, found, len(operations))
	}
	return checkMembers(spec, "bio_vec", 16, map[string]uint32{"bv_page": 0, "bv_len": 8, "bv_offset": 12})
}

// checkMembers compares a structure's size and offsets, in bytes.
func checkMembers(spec *btf.Spec, name string, size uint32, offsets map[string]uint32) error {
	var s *btf.Struct
	if err := spec.TypeByName(name, &s); err != nil {
		return fmt.Errorf("%w: struct %s: %w", ErrKernel, name, err)
	}
	for member, want := range offsets {
		if got, err := offsetOf(s, member); err != nil || got != want || s.Size != size {
			return fmt.Errorf("%w: struct %s has %d bytes and %s at %d: want %d and %d (%v)", ErrKernel, name, s.Size, member, got, size, want, err)
		}
	}
	return nil
}

func offsetOf(s *btf.Struct, member string) (uint32, error) {
	for _, m := range s.Members {
		if m.Name == member {
			return m.Offset.Bytes(), nil
		}
	}
	return 0, fmt.Errorf("struct %s has no member %s: %w", s.Name, member, ErrKernel)
}

// FindPassthrough finds out where the commands of a kind of driver (PassSCSI,
// PassNVMe) lie in memory, from the type information of the module that has
// them. Where it cannot, every outgoing command counts as one that may have
// written: PassUnknown, with the reason.
func FindPassthrough(kind uint32) (Passthrough, error) {
	where := map[uint32]struct{ module, name, member string }{
		PassSCSI: {"scsi_mod", "scsi_cmnd", "cmnd"},
		PassNVMe: {"nvme_core", "nvme_request", "cmd"},
	}
	w, ok := where[kind]
	if !ok {
		return Passthrough{Kind: kind}, nil
	}
	s, err := structOf(w.module, w.name)
	if err != nil {
		return Passthrough{Kind: PassUnknown}, err
	}
	offset, err := offsetOf(s, w.member)
	if err != nil {
		return Passthrough{Kind: PassUnknown}, err
	}
	// A driver's part of a request begins at the request's end.
	return Passthrough{Kind: kind, Offset: offset}, nil
}

// structOf looks in the kernel, where a driver may be built in, then in its module.
func structOf(module, name string) (*btf.Struct, error) {
	var s *btf.Struct
	if spec, err := btf.LoadKernelSpec(); err == nil && spec.TypeByName(name, &s) == nil {
		return s, nil
	}
	spec, err := btf.LoadKernelModuleSpec(module)
	if err != nil {
		return nil, fmt.Errorf("type information of module %s: %w", module, err)
	}
	if err := spec.TypeByName(name, &s); err != nil {
		return nil, fmt.Errorf("struct %s of module %s: %w", name, module, err)
	}
	return s, nil
}
