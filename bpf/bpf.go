// Package bpf holds the eBPF programs of the tap as compiled objects, and the
// sources they come from. internal/tap loads and drives them.
package bpf

import _ "embed"

//go:generate ./compile tap.bpf.c tap.o
//go:generate ./compile calibrate.bpf.c calibrate.o

// Tap is the object with the programs and maps of one group.
//
//go:embed tap.o
var Tap []byte

// Calibrate is the object that finds out where pages are in memory.
//
//go:embed calibrate.o
var Calibrate []byte
