//go:build !steps

package main

// step is called at the steps of a mark over groups. Only binaries for tests
// have one: see steps_on.go.
var step func(string)
