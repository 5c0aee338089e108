// Package fault is a filter for tests: requests end with an error instead of
// reaching what lies below.
package fault

import "tidemark/internal/stack"

// Driver gives a filter that asks fail about each request, concurrently; nil: it
// goes on.
func Driver(fail func(r *stack.Request) error) stack.Driver {
	return stack.DriverFunc(func(*stack.Below) (stack.Filter, error) { return filter(fail), nil })
}

type filter func(r *stack.Request) error

func (f filter) Handle(r *stack.Request, next stack.Next) error {
	if err := f(r); err != nil {
		return err
	}
	return next.Do(r)
}

func (f filter) Spoil(error) string  { return "nothing" }
func (f filter) Detach(stack.Reason) {}
