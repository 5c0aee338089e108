// Package bench measures the whole program beside its peers, both in one run,
// as ratios: make bench. docs/performance.md keeps the results.
package bench
