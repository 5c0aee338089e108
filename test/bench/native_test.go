//go:build !guest

package bench

const turns = 5
