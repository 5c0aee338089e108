// Package doctor says what this machine and a disk of it can do, and why not
// the rest, with a remedy for each; and it finds what earlier runs left behind.
// It needs no daemon. It changes nothing, except that Machine, as root, runs a
// tap on a loop device of its own for a moment, and that a Fix does what it says.
package doctor

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// Answer is what came of a question. A question that cannot be answered here
// is CannotTell, never a guess.
type Answer string

// The answers.
const (
	Yes        Answer = "yes"
	No         Answer = "no"
	CannotTell Answer = "cannot tell"
)

// Check is one question about the machine. Code is stable.
type Check struct {
	Code   string `json:"code"`
	What   string `json:"what"` // for people
	Answer Answer `json:"answer"`
	Reason string `json:"reason,omitempty"`
	Remedy string `json:"remedy,omitempty"`
}

// probe is a question with the way to find out. Its error is the reason for No;
// one that wraps errCannotTell is the reason for CannotTell.
type probe struct {
	code, what, remedy string
	run                func() error
}

var errCannotTell = errors.New("cannot tell")

// tapProbes are what the tap needs, all of it; the trial runs where the rest is there.
func tapProbes() []probe {
	return []probe{
		{"privileges", "root, or what makes it up", "run as root", privileges},
		{"btf", "the kernel describes its types (BTF)", "use a kernel built with CONFIG_DEBUG_INFO_BTF: those of all current distributions are", haveBTF},
		{"bpffs", "a BPF file system to pin to", "mount -t bpf bpf /sys/fs/bpf", haveBPFFS},
		{"bpf-ring", "BPF ring buffers", "use Linux 6.1 or later", func() error { return feature(features.HaveMapType(ebpf.RingBuf)) }},
		{"bpf-syscall", "BPF programs run on request", "use Linux 6.1 or later", func() error { return feature(features.HaveProgramType(ebpf.Syscall)) }},
		{"bpf-tracepoints", "BPF programs on the block layer's tracepoints", "use a kernel with CONFIG_BLK_DEV_IO_TRACE or CONFIG_TRACEPOINTS, and no lockdown of confidentiality", tracepoints},
		{"bpf-read", "BPF programs may read the kernel's memory (payload)", "boot with lockdown of integrity at the most", notConfidential},
	}
}

func otherProbes() []probe {
	return []probe{
		{"loop", "loop devices", "modprobe loop", func() error { return node("/dev/loop-control") }},
		{"fuse", "file systems in user space (FUSE)", "modprobe fuse", func() error { return node("/dev/fuse") }},
		{"device-mapper", "device-mapper", "modprobe dm_mod", func() error { return node("/dev/mapper/control") }},
		{"ublk", "block devices in user space (ublk)", "modprobe ublk_drv; Linux 6.0 or later with CONFIG_BLK_DEV_UBLK", func() error { return node("/dev/ublk-control") }},
		{"nbd", "network block devices of the kernel", "modprobe nbd", func() error { return node("/dev/nbd0") }},
		{"cuse", "character devices in user space (CUSE)", "modprobe cuse", func() error { return node("/dev/cuse") }},
	}
}

// Machine answers every question about the machine. As root it ends with a
// trial of the tap, which takes about a second.
func Machine() []Check {
	out := tapChecks()
	for _, p := range otherProbes() {
		out = append(out, ask(p))
	}
	return out
}

func tapChecks() []Check {
	var out []Check
	able := true
	for _, p := range tapProbes() {
		c := ask(p)
		able = able && c.Answer == Yes
		out = append(out, c)
	}
	return append(out, trialChecks(able)...)
}

func ask(p probe) Check {
	c := Check{Code: p.code, What: p.what, Answer: Yes}
	err := p.run()
	switch {
	case err == nil:
		return c
	case errors.Is(err, errCannotTell):
		c.Answer = CannotTell
	default:
		c.Answer = No
	}
	c.Reason, c.Remedy = err.Error(), p.remedy
	return c
}

// Capabilities that root may have lost (linux/capability.h).
const (
	capSysAdmin = 21
	capPerfmon  = 38
	capBPF      = 39
	capIPCLock  = 14
)

func privileges() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("own capabilities: %w: %w", err, errCannotTell)
	}
	has := func(n int) bool { return data[n/32].Effective>>(n%32)&1 != 0 }
	var missing []string
	for _, c := range []struct {
		n    int
		name string
	}{{capSysAdmin, "CAP_SYS_ADMIN"}, {capBPF, "CAP_BPF"}, {capPerfmon, "CAP_PERFMON"}, {capIPCLock, "CAP_IPC_LOCK"}} {
		if !has(c.n) {
			missing = append(missing, c.name)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("this process lacks %s", strings.Join(missing, ", "))
	}
	return nil
}

func haveBTF() error {
	_, err := btf.LoadKernelSpec()
	return err
}

// haveBPFFS is content with a place where the file system can be mounted: the tap does that.
func haveBPFFS() error {
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/bpf", &st); err != nil {
		return fmt.Errorf("/sys/fs/bpf: %w", err)
	}
	if st.Type == unix.BPF_FS_MAGIC {
		return nil
	}
	known, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return fmt.Errorf("%w: %w", err, errCannotTell)
	}
	if !strings.Contains(string(known), "\tbpf\n") {
		return errors.New("the kernel has no BPF file system")
	}
	return nil
}

// feature sorts the answers of cilium/ebpf: only "not supported" is a no.
func feature(err error) error {
	if err == nil || errors.Is(err, ebpf.ErrNotSupported) {
		return err
	}
	return fmt.Errorf("%w: %w", err, errCannotTell)
}

func tracepoints() error {
	if err := rlimit.RemoveMemlock(); err != nil {
		return fmt.Errorf("%w: %w", err, errCannotTell)
	}
	for _, at := range []string{"block_bio_queue", "block_rq_issue", "block_rq_complete", "block_bio_complete"} {
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: at, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
		})
		if errors.Is(err, unix.EPERM) {
			return fmt.Errorf("%s: %w: %w", at, err, errCannotTell)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", at, err)
		}
		p.Close()
	}
	return nil
}

func notConfidential() error {
	b, err := os.ReadFile("/sys/kernel/security/lockdown")
	if errors.Is(err, os.ErrNotExist) { // no lockdown, or securityfs is not mounted: the trial finds out
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w: %w", err, errCannotTell)
	}
	if strings.Contains(string(b), "[confidentiality]") {
		return errors.New("lockdown is set to confidentiality")
	}
	return nil
}

func node(path string) error {
	_, err := os.Stat(path)
	return err
}
