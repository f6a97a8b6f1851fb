// Package arch holds the test that keeps imports going down.
package arch
