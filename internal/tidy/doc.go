// Package tidy holds no code: its test holds the repository to its own map.
package tidy
