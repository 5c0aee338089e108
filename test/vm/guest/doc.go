// Package guest holds tests that need a kernel, or devices, that only the
// virtual machine has. They are compiled under the build tag guest and run by
// test/vm; nothing here runs on the host.
package guest
