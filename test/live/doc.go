// Package live holds tests of the whole program, the real binary on real loop
// disks: order, content, kills, gaps, what status and restore promise. Seeds
// are replayed with TIDEMARK_SEED=N; TIDEMARK_SEEDS=N tries N of them.
package live
